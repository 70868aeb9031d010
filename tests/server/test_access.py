import pytest

from sharpen.errors import InputError
from sharpen.server.app import api_key, check_key, is_loopback
from sharpen.server.errors import HTTPError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host):
    assert is_loopback(host)
    assert api_key(host, {}) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "example.org", "127.0.0.1.evil"])
def test_what_others_can_reach_needs_a_key(host):
    with pytest.raises(InputError, match="needs a key; set the environment variable SHARPEN_API_"):
        api_key(host, {})
    assert api_key(host, {"SHARPEN_API_KEY": "k"}) == "k"


@pytest.mark.parametrize("key", ["", " k", "k\n", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused(key):
    with pytest.raises(InputError, match="must hold a key in ASCII"):
        api_key("127.0.0.1", {"SHARPEN_API_KEY": key})


def test_only_the_whole_key_opens():
    check_key(None, b"")
    check_key("secret", b"Bearer secret")
    check_key("secret", b"bearer  secret")
    for wrong in (
        b"",
        b"secret",
        b"Bearer",
        b"Bearer secre",
        b"Bearer secrets",
        b"Basic secret",
        b"Bearer \xff",
    ):
        with pytest.raises(HTTPError, match="must be `Bearer KEY`") as refused:
            check_key("secret", wrong)
        assert refused.value.status == 401
        assert refused.value.headers == {"WWW-Authenticate": "Bearer"}
