module csi-quobyte.test/pause

go 1.26
