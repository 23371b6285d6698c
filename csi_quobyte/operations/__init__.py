"""What a request means, free of gRPC: volumes, snapshots, staging."""
