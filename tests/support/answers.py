"""Reading what a server answered."""

from __future__ import annotations

import io
import json
from typing import Any

import nibabel
import numpy as np
import requests
from requests_toolbelt.multipart import decoder

OBLIQUE = np.array([[-2.9, 0.3, 0.1, 80.0], [0.2, 2.8, -0.4, -90.0], [0.1, 0.3, 4.9, -30.0], [0, 0, 0, 1.0]])


def read_answer(response: requests.Response) -> tuple[dict[str, Any], bytes, str]:
    """Params, mask bytes and file name of an output=all answer."""
    assert response.status_code == 200, response.text[:2000]
    parts = decoder.MultipartDecoder.from_response(response).parts
    params, image = {}, b""
    name = ""
    for part in parts:
        disposition = part.headers[b"Content-Disposition"].decode()
        if 'name="params"' in disposition:
            params = json.loads(part.text)
        else:
            image, name = part.content, disposition
    return params, image, name


def read_mask(image: bytes, suffix: str = ".nii.gz") -> nibabel.Nifti1Image:
    if suffix == ".nii.gz":
        import gzip

        image = gzip.decompress(image)
    return nibabel.Nifti1Image.from_stream(io.BytesIO(image))
