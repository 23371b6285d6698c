"""python -m csi_quobyte: the same as the command csi-quobyte."""

from csi_quobyte.cli.main import main

main()
