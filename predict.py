"""Shows what a trained task says of images: python predict.py --help."""

from visiontasks.cli.predict import main

if __name__ == "__main__":
    main()
