import sys

from recipes.launch import main
from recipes.openrlhf import host

if __name__ == "__main__":
    sys.exit(main(host))
