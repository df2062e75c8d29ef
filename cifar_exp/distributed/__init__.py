"""Communication between ranks: process group, collectives, gradient averaging, batch norm over ranks, heartbeats."""
