"""Tests on real pretrained models, as `make bases` builds them."""
