"""What a user asked, from the toy trainer's flags."""

from __future__ import annotations

import math

import klplug
from klplug.hosting.settings import Asked, Settings, SettingsError, Unknown


def asked(settings: Settings) -> Asked:
    kl_type = settings.get("klplug.kl_type")
    if kl_type is None:
        raise SettingsError("--klplug.kl_type is missing")
    spec = klplug.parse(str(kl_type))
    try:
        kl_coef = klplug.check_kl_coef(spec, settings.get("klplug.kl_coef"))
    except Unknown:
        kl_coef = math.nan
    return Asked(spec, kl_coef)
