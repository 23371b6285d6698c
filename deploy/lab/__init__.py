"""Trying and testing the driver on one machine: a stand-in for Quobyte, both processes, a gRPC client."""
