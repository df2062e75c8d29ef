"""Ranks: process group, collectives, gradient averaging, batch norm over ranks, heartbeats."""
