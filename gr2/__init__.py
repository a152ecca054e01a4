"""GR2: the domain, in pure functions. Every other room may import this one; it imports none of them."""

__version__ = "0.1.0"
