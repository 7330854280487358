"""Rows in files that are mapped into memory (``window_storage="disk"``)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..window.storage import Allocate


