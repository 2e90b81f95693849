"""Texts and prepared corpora for tests: files of records, what was stored of them, and a reference for the hold-out."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
