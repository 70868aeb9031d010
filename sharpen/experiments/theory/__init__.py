"""The theory of sharpening, computed: y*(x), coverage, guarantees and small exact models."""
