"""GR2: the domain, in pure functions. Every other room may import this one; it imports none of them."""

from pathlib import Path

__version__ = "0.1.0"
PROJECT = Path(__file__).resolve().parent.parent
