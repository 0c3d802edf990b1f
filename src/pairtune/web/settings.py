"""Django's settings. What differs from one start to the next comes from the environment; `pairtune serve` sets it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import dj_database_url

HERE = Path(__file__).parent

# Folder of the runs that are shown, the models' server, and the site's own data.
PAIRTUNE_RUNS = Path(os.environ.get("PAIRTUNE_RUNS", "runs")).absolute()
PAIRTUNE_BACKEND = os.environ.get("PAIRTUNE_BACKEND", "http://127.0.0.1:8001")
PAIRTUNE_SITE = Path(os.environ.get("PAIRTUNE_SITE", Path.home() / ".local" / "share" / "pairtune")).absolute()

# Of a backend that asks for one; taken from the environment, kept nowhere.
PAIRTUNE_KEY = os.environ.get("PAIRTUNE_BACKEND_KEY", "")

# Signs nothing that lasts: there are no logins, so a new key at every start loses nothing.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe(48)
DEBUG = False
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *filter(None, os.environ.get("PAIRTUNE_HOSTS", "").split(","))]

INSTALLED_APPS = ["pairtune.web", "django.contrib.staticfiles", "django_htmx", "csp"]  # ours first: its runserver
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "connect-src": ["'self'"],
        "form-action": ["'self'"],
        "base-uri": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
}
X_FRAME_OPTIONS = "DENY"
CSRF_COOKIE_SAMESITE = "Strict"

ROOT_URLCONF = "pairtune.web.urls"
ASGI_APPLICATION = "pairtune.web.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]

DATABASES = {"default": dj_database_url.config(default=f"sqlite:///{PAIRTUNE_SITE / 'site.sqlite3'}")}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    # Readers do not wait for the writer, and a writer waits for another instead of failing.
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True  # nothing is collected: the files lie in the packages
WHITENOISE_AUTOREFRESH = False
LANGUAGE_CODE = "en-gb"
USE_TZ, TIME_ZONE = False, None  # times are those of the machine, as the person sees them on its clock
DATA_UPLOAD_MAX_MEMORY_SIZE = 12_000_000  # a prompt of 1 MB is refused by its length, not as a broken form
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
