"""Shards as a data set: WebDataset tar files and MosaicML streaming (MDS), in a folder or an S3-compatible bucket."""
