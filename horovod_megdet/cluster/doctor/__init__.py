"""``megdet doctor``: says what would make a training run fail or slow, and what to do about it."""
