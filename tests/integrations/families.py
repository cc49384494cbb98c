"""The families of transformers models that `mm.replace` is held to."""

from tests.integrations.families_mixed import MIXED_FAMILIES
from tests.integrations.families_text import TEXT_FAMILIES
from tests.integrations.families_vision import VISION_FAMILIES

FAMILIES = [*TEXT_FAMILIES, *VISION_FAMILIES, *MIXED_FAMILIES]
