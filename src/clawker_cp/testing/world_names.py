"""
Names and addresses of the test world: plain data that the servers and the tests share.

Every address is one of the ranges that documents may use (RFC 5737, RFC 3849), so that nothing
here can ever be a real machine. Called by `world` and `world_server`.
"""

from __future__ import annotations

RANGES_V4 = ("198.51.100.0/24", "203.0.113.0/24")
RANGES_V6 = ("2001:db8::/32",)

DNS_SERVER = "198.51.100.53"
SECOND_DNS_SERVER = "198.51.100.54"

API = "198.51.100.10"
WWW = "198.51.100.11"
WILDCARD = "198.51.100.12"
SHARED = "198.51.100.14"
GIT = "203.0.113.20"
DATABASE = "203.0.113.30"
DATAGRAMS = "203.0.113.31"
EVIL = "203.0.113.66"

HTTP_PORTS = (80, 8080, 9080)
HTTPS_PORTS = (443, 8443, 9443)
SSH_PORT = 22
DNS_PORT = 53
# Every address of the world answers on each of these: a connection that a test expects to be
# refused would have worked had nothing refused it.
TCP_ECHO_PORTS = (25, 853, 2222, 5432, 6379, 9000)
UDP_ECHO_PORTS = (123, 443, 4500, 5000, 9001)

# One line of the control socket: a whole log.
CONTROL_LINE_BYTES = 1 << 26

Zone = dict[str, dict[str, list[str]]]

# name -> type -> data, as zone files write it; "*." is a wildcard of any depth below.
ZONE: Zone = {
    "api.example.com": {"A": [API], "AAAA": ["2001:db8::10"], "TXT": ['"a text"'], "MX": ["10 www.example.com."]},
    "www.example.com": {"A": [WWW], "AAAA": ["2001:db8::11"], "HTTPS": ["1 . alpn=h2,h3 ipv4hint=198.51.100.11"]},
    "hidden.example.com": {"A": [WWW], "HTTPS": ['1 . alpn=h2 ech="AAT+DQAA"']},
    "a.wild.example.com": {"A": [WILDCARD]},
    "b.wild.example.com": {"A": [WILDCARD]},
    "big.example.com": {"A": [API]},
    "cdn.example.com": {"CNAME": ["edge.example.net."]},
    "edge.example.net": {"A": ["198.51.100.15"]},
    "*.example.net": {"A": [WILDCARD], "AAAA": ["2001:db8::12"]},
    "one.shared.example.com": {"A": [SHARED]},
    "two.shared.example.com": {"A": [SHARED]},
    "git.example.org": {"A": [GIT]},
    "db.example.com": {"A": [DATABASE]},
    "db.example.org": {"A": [DATABASE]},
    "udp.example.com": {"A": [DATAGRAMS]},
    "evil.example.org": {"A": [EVIL]},
    "only6.example.com": {"AAAA": ["2001:db8::6"]},
    "many.example.com": {"A": [f"198.51.100.{host}" for host in range(100, 180)]},
    "loop.example.com": {"CNAME": ["pool.example.com."]},
    "pool.example.com": {"CNAME": ["loop.example.com."]},
    "rebind.example.org": {"A": ["10.0.0.1"]},
    "metadata.example.org": {"A": ["169.254.169.254"]},
    "loopback.example.org": {"A": ["127.0.0.1"]},
    "mixed.example.org": {"A": [EVIL, "192.168.1.1"]},
}
