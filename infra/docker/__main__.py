"""`python -m infra.docker`."""

import sys

from infra.docker import main

sys.exit(main())
