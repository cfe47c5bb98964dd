"""`python -m internlm.apis.chat PATH`"""

import sys

from internlm.apis.terminal import main

if __name__ == "__main__":
    sys.exit(main())
