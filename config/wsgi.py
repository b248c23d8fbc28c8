"""The admin for a WSGI server: `gunicorn config.wsgi`. It serves the database of DATABASE_URL and no other."""

import os

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

if settings.IS_DEVELOPMENT:
    raise ImproperlyConfigured(
        "DATABASE_URL is not set: config.wsgi serves no other database. Set it in the environment of the web server, "
        "or in .env. `python manage.py runserver` shows the embedded development database."
    )

if settings.NOT_SERVED:
    raise ImproperlyConfigured(settings.NOT_SERVED)

application = get_wsgi_application()
