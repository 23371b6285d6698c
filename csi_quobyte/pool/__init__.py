"""What is on a mounted Quobyte volume: records, layers, locks, capacity."""
