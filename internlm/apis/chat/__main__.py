"""`python -m internlm.apis.chat PATH`"""

from internlm.apis.terminal import main

if __name__ == "__main__":
    main()
