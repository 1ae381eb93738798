"""Watching the ranks of a job: heartbeats, what they mean, and the end of a job that makes no progress."""
