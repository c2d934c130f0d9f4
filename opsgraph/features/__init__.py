"""What not every call or plan needs: each feature is one file, and one hook in what it serves."""

from . import declared_fusers as declared_fusers
from . import derived as derived
