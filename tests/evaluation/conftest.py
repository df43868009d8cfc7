"""What the tests of evaluation share."""

import scipy.stats  # noqa: F401 - imported here, or the first example of a property takes a second
