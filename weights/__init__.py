"""Real weights for the pages: what packages ship, as checkpoint folders below build/."""
