"""Everything that touches Lightning's private names or loops."""
