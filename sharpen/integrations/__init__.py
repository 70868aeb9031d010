"""sharpen inside other programs: one file or folder a host, which alone imports it."""
