"""What PostgreSQL refuses comes back as it would have, but for its texts; and the server's log has nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from crm.postgres.errors import row_refusal, sqlstate
from crm.try_execute import try_execute
from tests.conftest import Database
from tests.support.processes import server_log

TABLE = """
CREATE TABLE public.people (id text PRIMARY KEY, "100%" text CHECK ("100%" <> 'ann@example.com'), age int NOT NULL);
CREATE FUNCTION public.look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF NEW.age > 1000 THEN
    RAISE EXCEPTION 'no %', NEW."100%" USING ERRCODE = 'P' || NEW.age, DETAIL = NEW."100%";
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER look BEFORE INSERT ON public.people FOR EACH ROW EXECUTE FUNCTION public.look();
INSERT INTO public.people VALUES ('there', 'bob@example.com', 1)
"""
INSERT = """
INSERT INTO public.people (id, "100%%", age) SELECT * FROM unnest(%s::text[], %s::text[], %s::int[]) RETURNING id
"""
REFUSED: dict[str, list[Any]] = {
    "check": [["new"], ["ann@example.com"], [1]],
    "null": [["new"], ["carla@example.com"], [None]],
    "unique": [["new", "there"], ["carla@example.com", "bob@example.com"], [1, 1]],
    "cast": [["new"], ["carla@example.com"], "{carla@example.com}"],
    "trigger": [["new"], ["carla@example.com"], [4711]],
}


def test_it_returns_what_the_statement_returns(database: Database) -> None:
    database.change(TABLE)
    awkward = ['"', "\\", "%", "%s", "$1", "$statement$", "NULL", "{", "'"]
    keys = try_execute(connection, INSERT, [awkward, awkward, list(range(len(awkward)))])
    assert keys == awkward
    rows = database.rows('SELECT id, "100%%" FROM public.people WHERE id <> %s ORDER BY age', "there")
    assert rows == [(text, text) for text in awkward]
    assert try_execute(connection, f"{INSERT.rstrip()}", [[], [], []]) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_the_servers_own_without_its_texts(database: Database, name: str) -> None:
    database.change(TABLE)
    with server_log() as logged:
        with pytest.raises(DatabaseError) as caught, transaction.atomic():
            try_execute(connection, INSERT, REFUSED[name])
        assert logged() == ""
    with pytest.raises(DatabaseError) as told, transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(INSERT, REFUSED[name])
    assert type(caught.value) is type(told.value)
    assert type(caught.value.__cause__) is type(told.value.__cause__)
    assert sqlstate(caught.value) == sqlstate(told.value) is not None
    assert row_refusal(caught.value) == row_refusal(told.value) is not None
    assert "example.com" in str(told.value.__cause__) or name in ("null", "unique"), "otherwise the next line is idle"
    assert "@" not in str(caught.value) + str(caught.value.__cause__)
    assert database.rows("SELECT id FROM public.people") == [("there",)]


def test_what_says_nothing_of_a_row_is_logged(database: Database) -> None:
    database.change(TABLE.replace("'P' || NEW.age", "'40001'"))
    with server_log() as logged, pytest.raises(DatabaseError) as caught:
        try_execute(connection, INSERT, REFUSED["trigger"])
    assert sqlstate(caught.value) == "40001"
    assert "ERROR:  no carla@example.com" in logged()
