"""Pages with scripts: one file each, that needs no server and asks for nothing."""
