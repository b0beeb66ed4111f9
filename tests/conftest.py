"""What all tests share: hypothesis runs the same examples every time, and more of them with DENGEN_FULL=1.

The fixtures that start mosquitto, brokers, agents and meters come from the published plugin `dengen_testing`.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("full" if os.environ.get("DENGEN_FULL") == "1" else "quick")
