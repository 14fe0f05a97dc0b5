package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestOnlyPublicAddressesAreFetchedFrom(t *testing.T) {
	t.Parallel()
	for kind, addresses := range map[string][]string{
		"loopback": {"127.0.0.1", "127.0.0.0", "127.1.2.3", "127.255.255.255", "::1", "0:0:0:0:0:0:0:1",
			"::1%lo"},
		"unspecified": {"0.0.0.0", "0.0.0.1", "0.255.255.255", "::", "::0.0.0.0", "::%lo"},
		"private": {"10.0.0.0", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1",
			"192.168.255.255"},
		"link-local": {"169.254.0.1", "169.254.169.254", "169.254.255.255", "fe80::1", "fe80::1%eth0",
			"fe80::1%1", "febf:ffff::1", "fe80::a9fe:a9fe"},
		"carrier-grade": {"100.64.0.0", "100.64.0.1", "100.100.100.200", "100.127.255.255"},
		"multicast":     {"224.0.0.1", "239.255.255.255", "ff02::1", "ff02::1%eth0", "ff05::2", "ff0e::1"},
		"broadcast":     {"255.255.255.255"},
		"reserved": {"240.0.0.1", "254.1.2.3", "192.0.0.1", "192.0.0.170", "4000::1", "5f00::1", "8000::1",
			"e000::1"},
		"benchmark": {"198.18.0.1", "198.19.255.255", "2001:2::1"},
		"documentation": {"192.0.2.1", "198.51.100.1", "203.0.113.255", "2001:db8::1", "2001:DB8:FFFF::1",
			"3fff::1", "3fff:fff::1"},
		"unique local": {"fc00::1", "fd00:ec2::254", "fdff:ffff::1", "fec0::1"},
		"discard":      {"100::1"},
		"IPv4-mapped": {"::ffff:127.0.0.1", "::ffff:7f00:1", "::FFFF:10.0.0.1", "0:0:0:0:0:ffff:c0a8:1",
			"::ffff:169.254.169.254", "::ffff:100.64.0.1", "::ffff:0.0.0.0", "::ffff:255.255.255.255",
			"::ffff:127.0.0.1%lo"},
		"IPv4-compatible": {"::127.0.0.1", "::7f00:1", "::10.0.0.1", "::8.8.8.8"},
		"IPv4-translated": {"::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8"},
		"NAT64": {"64:ff9b::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::192.168.1.1",
			"64:ff9b::169.254.169.254", "64:ff9b::100.64.0.1", "64:ff9b::192.0.2.1", "64:ff9b::224.0.0.1",
			"64:ff9b::255.255.255.255", "64:ff9b::"},
		"local NAT64": {"64:ff9b:1::1", "64:ff9b:1::8.8.8.8", "64:ff9b:0:1::8.8.8.8"},
		"Teredo":      {"2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"},
		"ORCHID":      {"2001:10::1", "2001:20::1"},
		"6to4":        {"2002:7f00:1::1", "2002:a00:1::", "2002:808:808::1", "192.88.99.1"},
	} {
		for _, ip := range addresses {
			for _, port := range []string{"80", "443", "0"} {
				if err := checkAddress(net.JoinHostPort(ip, port), nil); err == nil {
					t.Errorf("%s, %s, is allowed", ip, kind)
				} else if k, _ := describe(err); k != kindBadRequest {
					t.Errorf("%s: %v, want %v", ip, k, kindBadRequest)
				}
			}
		}
	}
	for _, ip := range []string{"1.1.1.1", "8.8.8.8", "1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255",
		"100.128.0.0",
		"126.255.255.255", "128.0.0.1", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0",
		"192.0.1.1", "192.0.3.1", "192.88.98.1", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0",
		"203.0.112.1", "223.255.255.255", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b::808:808", "2000::1",
		"2001:200::1", "2001:4860:4860::8888", "2003::1",
		"2606:4700:4700::1111", "2a00:1450:4001::1", "3ffe::1"} {
		if err := checkAddress(net.JoinHostPort(ip, "443"), nil); err != nil {
			t.Errorf("%s is public: %v", ip, err)
		}
	}
	for _, text := range []string{"", "8.8.8.8", ":80", "localhost:80", "8.8.8.8:http", "8.8.8:80",
		"134744072:80", "0x8.8.8.8:80",
		"010.8.8.8:80", "8.8.8.8.:80", "[8.8.8.8]:80", "2606:4700::1", "[2606:4700::1]", "8.8.8.8:80:80",
		"[::ffff:8.8.8.8:80", "/run/docker.sock"} {
		if err := checkAddress(text, networks("0.0.0.0/0", "::/0")); err == nil {
			t.Errorf("%q is no address and a port, and is allowed", text)
		}
	}
}

func TestFetchAllowListsMoreAddresses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		ip      string
		allowed bool
		allow   []netip.Prefix
	}{
		{"127.0.0.1", true, networks("127.0.0.0/8")},
		{"127.0.0.1", true, networks("127.0.0.1/32")},
		{"127.0.0.1", true, networks("10.0.0.0/8", "127.0.0.0/8")},
		{"127.0.0.1", false, networks("127.0.0.2/32")},
		{"127.0.0.1", false, networks("::1/128")},
		{"127.0.0.1", false, networks("::/0")},
		{"::ffff:127.0.0.1", true, networks("127.0.0.0/8")},
		{"::127.0.0.1", false, networks("127.0.0.0/8")},
		{"::1", false, networks("127.0.0.0/8")},
		{"::1", false, networks("0.0.0.0/0")},
		{"::1", true, networks("::1/128")},
		{"10.1.2.3", true, networks("10.1.2.0/24")},
		{"10.1.2.3", true, networks("10.1.2.99/24")},
		{"10.1.3.3", false, networks("10.1.2.0/24")},
		{"::ffff:10.1.3.3", false, networks("10.1.2.0/24")},
		{"169.254.169.254", true, networks("0.0.0.0/0")},
		{"100.64.0.1", true, networks("100.64.0.0/10")},
		{"64:ff9b::10.1.2.3", false, networks("10.0.0.0/8")}, // the translator's 10.1.2.3 need not be ours
		{"64:ff9b::10.1.2.3", true, networks("64:ff9b::/96")},
		{"fd12:3456::1", true, networks("fd12:3456::/32")},
		{"fd12:3457::1", false, networks("fd12:3456::/32")},
		{"fe80::1%eth0", true, networks("fe80::/10")},
		{"8.8.8.8", true, networks("10.0.0.0/8")},
	} {
		if err := checkAddress(net.JoinHostPort(c.ip, "80"), c.allow); (err == nil) != c.allowed {
			t.Errorf("%s with -fetch-allow %v: %v", c.ip, c.allow, err)
		}
	}
}

// A trap listens where the daemon must not connect to, on every address.
type trap struct {
	port    int
	callers chan int // their ports, in the order in which they came
}

func newTrap(t *testing.T) trap {
	listener, err := net.Listen("tcp", ":0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	l := trap{listener.Addr().(*net.TCPAddr).Port, make(chan int, 100)}
	go func() { // ends with the listener
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			l.callers <- conn.RemoteAddr().(*net.TCPAddr).Port
			conn.Close()
		}
	}()
	return l
}

// wantUntouched connects itself: a connection that the daemon made would have come first.
func (l trap) wantUntouched(t *testing.T) {
	t.Helper()
	own, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", l.port))
	must(t, err)
	defer own.Close()
	if first := <-l.callers; first != own.LocalAddr().(*net.TCPAddr).Port {
		t.Errorf("there was a connection from port %d", first)
	}
}

// CVE-2024-34068: the address is what counts, not how it is written or arrived at.
func TestInternalAddressesAreRefusedBeforeAnyConnection(t *testing.T) {
	t.Parallel()
	d, engine := startFetching(t, "127.0.0.2/32")
	hosts := []string{"127.0.0.1", "127.0.0.3", "0.0.0.0", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::1%25lo]",
		"[::ffff:127.0.0.1]",
		"[::FFFF:7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::1]",
		"localhost", "LocalHost.", "user:pass@127.0.0.1", "127.0.0.2@127.0.0.1", "１２７.０.０.１",
		"127。0。0。1", "①②⑦.⓪.⓪.①",
		// A resolver may take these for addresses or not know them: both end without a connection.
		"0", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001",
		"127.0.0.1.", "127.0.0.1%2e", "127.0.0.01"}
	for i, host := range hosts {
		t.Run(host, func(t *testing.T) {
			t.Parallel()
			l := newTrap(t)
			address := fmt.Sprintf("http://%s:%d/x", host, l.port)
			redirect := serveOn(t, "127.0.0.2", func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", address)
				w.WriteHeader(302)
			})
			for how, a := range map[string]answer{
				"direct":     createFrom(t, d, fmt.Sprintf("direct%d", i), address),
				"redirected": createFrom(t, d, fmt.Sprintf("redirected%d", i), redirect.URL),
			} {
				knownAddress := strings.HasPrefix(host, "[") || i < 3 || host == "localhost"
				if a.status != 400 && (knownAddress || a.status != 502) {
					t.Errorf("%s: status %d: %s", how, a.status, a.body)
				}
			}
			l.wantUntouched(t)
		})
	}
	t.Cleanup(func() { wantNothing(t, d, engine) })
}

func TestRedirectsAreFollowedFiveTimes(t *testing.T) {
	t.Parallel()
	d, _ := startFetching(t, "127.0.0.0/8")
	archive := tgz(file("a", "1"))
	server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		var code, left int
		fmt.Sscanf(r.URL.Path, "/%d/%d", &code, &left)
		if left == 0 {
			w.Write(archive)
			return
		}
		w.Header().Set("Location", fmt.Sprintf("/%d/%d", code, left-1))
		w.WriteHeader(code)
	})
	for _, code := range []int{301, 302, 303, 307, 308} {
		createFrom(t, d, fmt.Sprint("five", code), fmt.Sprintf("%s/%d/5", server.URL, code)).want(t, 201)
		if content, err := os.ReadFile(filepath.Join(d.binds, fmt.Sprint("five", code),
			"a")); string(content) != "1" {
			t.Errorf("after five redirects by %d the file is %q: %v", code, content, err)
		}
		createFrom(t, d, fmt.Sprint("six", code), fmt.Sprintf("%s/%d/6", server.URL, code)).want(t, 502,
			"more than 5 redirects")
	}
}

func TestRedirectsLeadToHTTPOnly(t *testing.T) {
	t.Parallel()
	d, engine := startFetching(t, "127.0.0.0/8")
	for i, target := range []string{"file:///etc/passwd", "FILE:///etc/passwd", "file://127.0.0.1/etc/passwd",
		"ftp://127.0.0.1/x", "gopher://127.0.0.1/x",
		"unix:///run/docker.sock", "data:application/gzip;base64,H4sI", "ws://127.0.0.1/", "mailto:a@b",
		"javascript:1"} {
		server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", target)
			w.WriteHeader(302)
		})
		createFrom(t, d, fmt.Sprint("svc", i), server.URL).want(t, 400, "bind_contents: ")
	}
	wantNothing(t, d, engine)
}

// What the daemon knows and what the URL holds goes to the server that the URL names.
func TestDownloadsGiveNothingAway(t *testing.T) {
	t.Parallel()
	d, engine := startFetching(t, "127.0.0.0/8", "::1/128")
	var mu sync.Mutex
	seen := map[string]string{}
	record := func(r *http.Request) {
		dump, _ := httputil.DumpRequest(r, true)
		mu.Lock()
		defer mu.Unlock()
		seen[r.URL.Path] = string(dump)
	}
	archive := tgz(file("a", "1"))
	other := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		record(r)
		w.Write(archive)
	})
	_, port, _ := net.SplitHostPort(other.Listener.Addr().String())
	named := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		record(r)
		w.Header().Set("Set-Cookie", "c=s3cret; Path=/")
		switch r.URL.Path {
		case "/first":
			w.Header().Set("Location", "/second")
		case "/second":
			w.Header().Set("Location", "http://localhost:"+port+"/third")
		}
		w.WriteHeader(302)
	})
	withSecrets := func(address, path string) string {
		return strings.Replace(address, "http://", "http://user:s3cret@", 1) + path + "?token=t0ken"
	}
	createFrom(t, d, "svc", withSecrets(named.URL, "/first")).want(t, 201)
	mu.Lock()
	requests := maps.Clone(seen)
	mu.Unlock()
	if first := requests["/first"]; !strings.Contains(first, "token=t0ken") ||
		!strings.Contains(first, "Authorization: Basic dXNlcjpzM2NyZXQ=") ||
		strings.Contains(first, d.key) || strings.Contains(first, "CoreKey") ||
		strings.Contains(first, "cmVnaXN0cnk") {
		t.Errorf("the named server was asked\n%s", first)
	}
	for path, secrets := range map[string][]string{
		// the same server keeps its password
		"/second": {"t0ken", "Referer", "Cookie", d.key, "CoreKey", "cmVnaXN0cnk"},
		"/third":  {"t0ken", "Referer", "Cookie", d.key, "CoreKey", "cmVnaXN0cnk", "Authorization"},
	} {
		if requests[path] == "" {
			t.Errorf("nobody asked for %s", path)
		}
		for _, secret := range secrets {
			if strings.Contains(requests[path], secret) {
				t.Errorf("%q is in the redirected request\n%s", secret, requests[path])
			}
		}
	}
	c, _ := engine.container("svc")
	stored, err := os.ReadFile(filepath.Join(d.binds, recordDir, "svc"))
	must(t, err)
	told := []string{fmt.Sprint(c.Labels, c.Config.Env), string(stored)}

	d.do(t, "DELETE", "/service/svc", "").want(t, 204)
	broken := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", map[string]string{"/moved": "http://[::1:x/",
			"/private": "http://10.0.0.1/?t0ken", "/closed": "http://127.0.0.1:1/?t0ken"}[r.URL.Path])
		w.WriteHeader(map[string]int{"/missing": 404, "/archive": 200, "/moved": 302, "/private": 302,
			"/closed": 302}[r.URL.Path])
	})
	for address, status := range map[string]int{
		withSecrets(broken.URL, "/missing"):               502,
		withSecrets(broken.URL, "/moved"):                 502,
		withSecrets(broken.URL, "/private"):               400,
		withSecrets(broken.URL, "/closed"):                502,
		withSecrets(broken.URL, "/archive"):               400,
		withSecrets("http://10.0.0.1", "/"):               400,
		withSecrets("http://127.0.0.1:1", "/"):            502,
		withSecrets("http://nobody.invalid", "/"):         502,
		withSecrets("ftp://127.0.0.1", "/"):               400,
		withSecrets("http://127.0.0.1:99999", "/"):        502,
		withSecrets("http://127.0.0.1/\x7f", "/"):         400,
		strings.Replace(broken.URL, "http", "https", 1):   502,
		withSecrets("http://[fe80::1%25nosuch]:8080", ""): 400,
	} {
		told = append(told, createFrom(t, d, "svc", address).want(t, status).body)
	}
	wantNothing(t, d, engine)
	for _, text := range append(told, d.log.String(), strings.Join(engine.calls(), "\n")) {
		for _, secret := range []string{"s3cret", "t0ken", d.key} {
			if strings.Contains(text, secret) {
				t.Errorf("%q is in %s", secret, text)
			}
		}
	}
}

// A proxy would connect in the daemon's place, past the check of the address.
func TestDownloadsUseNoProxyFromTheEnvironment(t *testing.T) {
	const marker = "DUXCORE_TEST_PROXIED"
	if os.Getenv(marker) != "" {
		d, _ := startFetching(t, "127.0.0.0/8")
		createFrom(t, d, "svc", "http://nobody.invalid/archive").want(t, 502)
		return
	}
	t.Parallel()
	l := newTrap(t)
	again := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$") // the environment is read once in a process
	again.Env = append(os.Environ(), marker+"=1")
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"} {
		again.Env = append(again.Env, fmt.Sprintf("%s=http://127.0.0.1:%d", name, l.port))
	}
	if output, err := again.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, output)
	}
	l.wantUntouched(t)
}

func TestServersThatFailAreBadGateways(t *testing.T) {
	t.Parallel()
	d, engine := startFetching(t, "127.0.0.0/8")
	archive := string(tgz(file("a", strings.Repeat("1", 100)), file("b", "2")))
	status := func(code string) string { return "HTTP/1.1 " + code + "\r\nContent-Length: 0\r\n\r\n" }
	ok := func(header, body string) string { return "HTTP/1.1 200 OK\r\n" + header + "\r\n\r\n" + body }
	for name, raw := range map[string]string{
		"no content":          status("204 No Content"),
		"not modified":        status("304 Not Modified"),
		"not found":           status("404 Not Found"),
		"internal error":      status("500 Internal Server Error"),
		"status that is none": status("999 What"),
		"part of it": "HTTP/1.1 206 Partial Content\r\nContent-Length: " +
			fmt.Sprint(len(archive)) + "\r\n\r\n" + archive,
		"redirect to nowhere": status("302 Found"),
		"no answer":           "",
		"another protocol":    "220 ftp ready\r\n",
		"broken off": ok("Content-Length: "+fmt.Sprint(len(archive)),
			archive[:len(archive)/2]),
		"broken off before the last byte": ok("Content-Length: "+fmt.Sprint(len(archive)),
			archive[:len(archive)-1]),
		"broken off behind the archive": ok("Content-Length: "+fmt.Sprint(len(archive)+1), archive),
		"broken off without a byte":     ok("Content-Length: 10", ""),
		"broken off in chunks": ok("Transfer-Encoding: chunked",
			fmt.Sprintf("%x\r\n%s\r\n", len(archive)/2, archive[:len(archive)/2])),
		"last chunk missing": ok("Transfer-Encoding: chunked",
			fmt.Sprintf("%x\r\n%s\r\n", len(archive), archive)),
		"chunk that is none":             ok("Transfer-Encoding: chunked", "zz\r\n"),
		"chunk extension without an end": ok("Transfer-Encoding: chunked", "1;"+strings.Repeat("x", 1<<20)),
		"transfer encoding of its own":   ok("Transfer-Encoding: gzip", archive),
		"two lengths":                    ok("Content-Length: 1\r\nContent-Length: 2", archive),
		"header of a megabyte":           ok("X: "+strings.Repeat("x", 1<<20), archive),
		"a hundred thousand headers":     ok(strings.Repeat("X: y\r\n", 100_000)+"X: y", archive),
		"a hundred thousand early hints": strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 100_000) +
			ok("X: y", archive),
		"location of a megabyte": "HTTP/1.1 302 Found\r\nLocation: /" + strings.Repeat("x", 1<<20) +
			"\r\n\r\n",
		"status line of a megabyte":   "HTTP/1.1 200 " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
		"status line that never ends": strings.Repeat("x", 1<<20),
		"trailers of a megabyte": ok("Transfer-Encoding: chunked\r\nTrailer: X",
			fmt.Sprintf("%x\r\n%s\r\n0\r\nX: %s\r\n\r\n", len(archive), archive, strings.Repeat("x", 1<<20))),
		"another protocol switched to": "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: " +
			"x\r\n\r\n" + archive,
		"connection closed in the header": "HTTP/1.1 200 OK\r\nContent-Le",
	} {
		t.Run(name, func(t *testing.T) {
			server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				io.WriteString(conn, raw)
			})
			if a := createFrom(t, d, "svc", server.URL).want(t, 502, "bind_contents: "); len(a.body) > 8<<10 {
				t.Errorf("the error has %d bytes", len(a.body))
			}
			wantNothing(t, d, engine)
		})
	}
}

// Some servers call a .tar.gz file a tar file that they have compressed for the way.
func TestArchiveWithAContentEncodingArrives(t *testing.T) {
	t.Parallel()
	d, _ := startFetching(t, "127.0.0.0/8")
	archive := tgz(file("a", "1"))
	server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(archive)
	})
	createFrom(t, d, "svc", server.URL).want(t, 201)
	if content, err := os.ReadFile(filepath.Join(d.binds, "svc", "a")); string(content) != "1" {
		t.Errorf("the file is %q: %v", content, err)
	}
}

// CVE-2025-69199: a server may not hold a create by sending nothing.
func TestSlowServersAreGivenUp(t *testing.T) {
	t.Parallel()
	archive := tgz(file("a", "1"))
	for name, sent := range map[string]string{
		"no header":   "",
		"no body":     "HTTP/1.1 200 OK\r\n\r\n",
		"half a body": "HTTP/1.1 200 OK\r\n\r\n" + string(archive[:len(archive)/2]),
		"no end":      "HTTP/1.1 200 OK\r\n\r\n" + string(archive),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				io.WriteString(conn, sent)
				io.Copy(io.Discard, conn) // until the client has left
			})
			f := newFetcher(loopback)
			f.stall = 50 * time.Millisecond
			err := f.fetch(t.Context(), server.URL, openTree(t, t.TempDir()),
				unpackLimits{bytes: 1 << 20, entries: 10}, nil)
			if err == nil {
				t.Fatal("it was unpacked")
			}
			if kind, text := describe(err); kind != kindDownloadFailed || !strings.Contains(text, "sent nothing") {
				t.Errorf("%v: %v", kind, err)
			}
		})
	}
}

// http.Client reads up to 2 KiB of a redirect's body before it follows it.
func TestBodyOfARedirectIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	archive := tgz(file("a", "1"))
	for _, length := range []string{"", "10", "2048", "99999"} {
		server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/archive" {
				w.Write(archive)
				return
			}
			w.Header().Set("Location", "/archive")
			if length != "" {
				w.Header().Set("Content-Length", length)
			}
			w.WriteHeader(302)
			http.NewResponseController(w).Flush()
			<-r.Context().Done() // the client has left
		})
		dir := t.TempDir()
		err := newFetcher(loopback).fetch(t.Context(), server.URL, openTree(t, dir),
			unpackLimits{bytes: 1 << 20, entries: 10}, nil)
		if content, _ := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(content) != "1" {
			t.Errorf("length %q: the file is %q: %v", length, content, err)
		}
	}
}

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Wherever in an archive the time ends, or the client leaves, that is the error, and not the archive.
func TestDownloadThatIsGivenUpIsNoBrokenArchive(t *testing.T) {
	t.Parallel()
	archive := tgz(file("a", strings.Repeat("some text", 1000)), file("b", "2"))
	for _, sent := range []int{0, 5, len(archive) / 2, len(archive) - 3} {
		for cause, want := range map[error]kind{context.DeadlineExceeded: kindTimeout,
			context.Canceled: kindUnavailable} {
			ctx, giveUp := context.WithCancelCause(t.Context())
			f := newFetcher(loopback)
			f.client.Transport = transportFunc(func(r *http.Request) (*http.Response, error) {
				rest := readerFunc(func([]byte) (int, error) { giveUp(cause); return 0, r.Context().Err() })
				body := io.NopCloser(io.MultiReader(bytes.NewReader(archive[:sent]), rest))
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: body}, nil
			})
			root := openTree(t, t.TempDir())
			err := f.fetch(ctx, "http://host/", root, unpackLimits{bytes: 1 << 20, entries: 10}, nil)
			if err == nil {
				t.Fatal("it was unpacked")
			}
			if got, text := describe(err); got != want {
				t.Errorf("%v after %d bytes: %v %s", cause, sent, got, text)
			}
		}
	}
}

// The rest of a refused archive is not waited for: it may have no end.
func TestDownloadOfARefusedArchiveEnds(t *testing.T) {
	t.Parallel()
	d, engine := startFetching(t, "127.0.0.0/8")
	left := make(chan struct{})
	server := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		defer close(left)
		zipped := gzip.NewWriter(w)
		zipped.Write(file("../x", "").bytes())
		for err := error(nil); err == nil; {
			_, err = io.CopyN(zipped, rand.Reader, 1<<20)
		}
	})
	createFrom(t, d, "svc", server.URL).want(t, 400, `../x`)
	<-left
	wantNothing(t, d, engine)
}
