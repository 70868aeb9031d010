"""Studies and theory: what the paper and this project measure; used by their verbs alone."""
