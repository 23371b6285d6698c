"""The copy-on-write heart: new layers, freeze, drop, collect."""
