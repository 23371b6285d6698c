"""What a machine can do: run commands, QEMU daemons, loop devices, filesystems."""
