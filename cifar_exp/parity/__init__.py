"""Do N ranks compute what one rank computes? The measurements behind `cifar-exp verify`."""
