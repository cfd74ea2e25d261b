import sys

from recipes.launch import main
from recipes.verl import host

if __name__ == "__main__":
    sys.exit(main(host))
