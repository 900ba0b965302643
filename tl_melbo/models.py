"""The old path of `tl_melbo.model`, kept for a release."""

from tl_melbo.model.bridge import Model, check_layer, check_model, model_device, model_name
from tl_melbo.model.load import BUNDLED_NAME, bundled_model_path, load_hugging_face, load_model
from tl_melbo.model.tokens import to_tokens

EMBEDDED_NAME, embedded_model_path = BUNDLED_NAME, bundled_model_path
