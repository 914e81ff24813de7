"""A sitecustomize of the user's, which must go on being the one that Python workers run."""

import sys

sys.users_own = True
