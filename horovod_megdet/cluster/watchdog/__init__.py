"""Watching over the ranks of a job: heartbeats, what they tell, and the end of a job that makes no progress."""
