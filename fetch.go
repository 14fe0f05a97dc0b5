package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	maxRedirects = 5
	minFetchRate = 64 << 10 // bytes a second
	readChunk    = 64 << 10 // bytes that are read at a time
)

// fetcher downloads bind_contents from servers that nobody vouches for.
type fetcher struct {
	client *http.Client
	window time.Duration // of waiting, over which minFetchRate must hold
}

// newFetcher returns a fetcher that connects to public addresses and to those in allow.
// It sends the URL and nothing else of ours.
func newFetcher(allow []netip.Prefix) *fetcher {
	dialer := &net.Dialer{
		Timeout: 30 * time.Second,
		// Called with the address of each connection before its first packet: after
		// the name was resolved, and after each redirect.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			return checkAddress(address, allow)
		},
	}
	transport := &http.Transport{ // without a proxy: one would resolve names for us, past the check
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if err := checkConnection(conn, allow); err != nil {
				conn.Close()
				return nil, err
			}
			return conn, nil
		},
		TLSHandshakeTimeout:    30 * time.Second,
		ResponseHeaderTimeout:  30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		DisableCompression:     true, // or the archive would arrive as a bare tar from some servers
	}
	checkRedirect := func(r *http.Request, via []*http.Request) error {
		r.Header.Del("Referer") // the whole URL that redirected, with its token
		if len(via) > maxRedirects {
			return failure(downloadFailed, "bind_contents: more than %d redirects", maxRedirects)
		}
		if r.URL.Scheme != "http" && r.URL.Scheme != "https" {
			return badRequest("bind_contents: redirected to something other than http or https")
		}
		return nil
	}
	return &fetcher{&http.Client{Transport: transport, CheckRedirect: checkRedirect}, time.Minute}
}

// nat64 holds addresses that a translator turns into the IPv4 address in their last four bytes (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// notPublic lists what [netip.Addr.IsGlobalUnicast] counts in though it is not public, from IANA's
// special-purpose registries (RFC 6890). 6to4 (2002::/16) and Teredo (in 2001::/23) hold an IPv4
// address. Of IPv6 only 2000::/3 is public at all. At 168.63.129.16 Azure tells its virtual
// machines their secrets.
var notPublic = prefixes("0.0.0.0/8 100.64.0.0/10 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 " +
	"198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 168.63.129.16/32 " +
	"2001::/23 2001:db8::/32 2002::/16 3fff::/20 ::/3 4000::/2 8000::/1")

func prefixes(list string) (all []netip.Prefix) {
	for text := range strings.FieldsSeq(list) {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// isIn reports whether an address is in one of the networks. One of IPv4 that is written as IPv6
// is in none of IPv4: see bare.
func isIn(addr netip.Addr, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, func(network netip.Prefix) bool { return network.Contains(addr) })
}

// checkAddress returns an error unless address, an ip:port, is allowed, or public and not this host's.
func checkAddress(address string, allow []netip.Prefix) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	addr := bare(ap)
	if isIn(addr, allow) {
		return nil
	}
	end := addr // where its packets end
	if nat64.Contains(addr) {
		b := addr.As16()
		end = netip.AddrFrom4([4]byte(b[12:]))
	}
	refused := badRequest("bind_contents: %s is not a public address", addr)
	if !end.IsGlobalUnicast() || end.IsPrivate() {
		return refused
	}
	ours, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, network := range ours { // what listens there may trust who comes from here
		if own, err := netip.ParsePrefix(network.String()); err == nil && own.Addr().Unmap().WithZone("") == end {
			return errOwnAddress
		}
	}
	if isIn(end, notPublic) {
		return refused
	}
	return nil
}

// bare returns the address alone: ::ffff:127.0.0.1 is 127.0.0.1.
func bare(ap netip.AddrPort) netip.Addr { return ap.Addr().Unmap().WithZone("") }

// errOwnAddress keeps an archive from coming from what listens on this host, such as the daemon itself.
var errOwnAddress = badRequest("bind_contents: this is the host's own address")

// checkConnection returns an error if a connection comes from where it goes to: this host, by a public
// address that no interface of it has, of a network that the kernel was told is here.
func checkConnection(conn net.Conn, allow []netip.Prefix) error {
	local := bare(conn.LocalAddr().(*net.TCPAddr).AddrPort())
	remote := bare(conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	if local != remote || isIn(remote, allow) {
		return nil
	}
	return errOwnAddress
}

var errTooSlow = failure(downloadFailed,
	"bind_contents: the server sends less than %d bytes a second", minFetchRate)

// fetch downloads the archive at address and lays it out in dir, at once and in
// constant memory. After an error dir holds a part of it.
func (f *fetcher) fetch(
	ctx context.Context, address string, dir *os.Root, limits unpackLimits, o *owner) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return badRequest("bind_contents: must be an http or https URL")
	}
	answer, err := f.client.Do(request)
	if err != nil {
		return fetchError(ctx, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return failure(downloadFailed, "bind_contents: the server answered %d", answer.StatusCode)
	}
	body := &download{body: answer.Body, window: f.window, cancel: cancel}
	err = unpack(bufio.NewReaderSize(body, readChunk), dir, limits, o)
	if body.err != nil { // whatever unpack made of it
		return fetchError(ctx, body.err)
	}
	return err
}

// fetchError says why a download failed, without its URL, which may hold a token.
func fetchError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if isA[*apiError](err) {
		return err
	}
	if in, ok := errors.AsType[*url.Error](err); ok {
		err = in.Err
	}
	return failure(downloadFailed, "bind_contents: cannot download: %s", plain(err))
}

// download is the body of an answer. It gives a server up that is too slow: one that, in the time
// that the daemon waits for it and up to the length of a window, has not sent what minFetchRate
// asks for. How long the daemon itself takes does not count. It remembers its error.
type download struct {
	body   io.Reader
	window time.Duration
	cancel context.CancelCauseFunc
	waited time.Duration // in this window
	got    int64         // bytes in this window
	err    error         // other than io.EOF
}

// Read starts the clock and stops it: only the time in which the server could have sent counts. The
// request's context is ended from the timer, since nothing else ends a read that hangs.
func (d *download) Read(p []byte) (int, error) {
	start := time.Now()
	late := time.AfterFunc(d.window-d.waited, func() { d.cancel(errTooSlow) })
	n, err := d.body.Read(p)
	late.Stop()
	d.waited += time.Since(start)
	d.got += int64(n)
	if d.got >= int64(minFetchRate*d.window.Seconds()) {
		d.waited, d.got = 0, 0
	}
	if err != nil && err != io.EOF {
		d.err = err
	}
	return n, err
}
