"""From image files to batches on the device: sources, caches, splits, augmentation."""
