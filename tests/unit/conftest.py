"""What holds for all tests."""

import hypothesis

# A test must not fail because the machine is slow: speed has benchmarks.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
