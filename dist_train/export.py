"""Export: the trained model for those who do not have this package."""

import contextlib
import io
import shutil
from pathlib import Path

import keras


def write(model: keras.Model, keras_file: Path, saved_model: Path) -> None:
    """Writes model.keras for Keras and saved_model/ for TensorFlow Serving, each whole.

    Args:
      model: built; its own input is what the exports take, without the task's `preprocess`.
      keras_file: for keras.saving.load_model.
      saved_model: for tf.saved_model.load, with the endpoint `serve`.
    """
    partial_file = keras_file.with_name("partial.keras")
    model.save(partial_file)
    partial_file.replace(keras_file)

    partial = saved_model.with_name("partial_saved_model")
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # Keras prints the signature at length
        model.export(partial, format="tf_saved_model", verbose=False)
    shutil.rmtree(saved_model, ignore_errors=True)
    partial.replace(saved_model)
