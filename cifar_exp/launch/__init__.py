"""From devices to ranks: which devices there are, starting one process for each, and watching them."""
