package main

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

const maxRedirects = 5

// fetcher downloads bind_contents from untrusted servers.
type fetcher struct {
	client *http.Client
	stall  time.Duration // the longest wait for an answer, redirects included, and for a byte of the archive
}

// newFetcher returns a fetcher that connects only to public addresses and to those in allow, which prevents
// server-side request forgery (SSRF). It sends the URL and nothing else of ours.
func newFetcher(allow []netip.Prefix) *fetcher {
	dialer := &net.Dialer{
		Timeout: 30 * time.Second, // divided among the addresses of a name
		// Called with the address of each connection before its first packet: after
		// the name was resolved, and after each redirect.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			return checkAddress(address, allow)
		},
	}
	transport := &http.Transport{ // without a proxy: one would resolve names for us, past the check
		DialContext:            dialer.DialContext,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		DisableCompression:     true, // or the archive would arrive as a bare tar from some servers
	}
	return &fetcher{&http.Client{Transport: transport, CheckRedirect: checkRedirect}, time.Minute}
}

// checkRedirect is called before each redirect is followed, with the request that would follow it.
func checkRedirect(r *http.Request, via []*http.Request) error {
	r.Response.Body.Close() // or http.Client would wait for up to 2 KiB of it, which may never come
	r.Header.Del("Referer") // the whole URL that redirected, with its token
	if len(via) > maxRedirects {
		return newAPIError(kindDownloadFailed, "bind_contents: more than %d redirects", maxRedirects)
	}
	if r.URL.Scheme != "http" && r.URL.Scheme != "https" {
		return badRequest("bind_contents: redirected to something other than http or https")
	}
	return nil
}

var errStalled = newAPIError(kindDownloadFailed, "bind_contents: the server sent nothing for a minute")

// nat64 holds addresses that a translator turns into the IPv4 address in their last four bytes (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// notPublic lists ranges that pass [netip.Addr.IsGlobalUnicast] but are not public, from IANA's
// special-purpose registries (RFC 6890). Addresses of 6to4 (2002::/16) and Teredo (in 2001::/23) contain
// an IPv4 address. In IPv6 only 2000::/3 is public at all. 168.63.129.16 is Azure's metadata address.
var notPublic = prefixes("0.0.0.0/8 100.64.0.0/10 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 " +
	"198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 168.63.129.16/32 " +
	"2001::/23 2001:db8::/32 2002::/16 3fff::/20 ::/3 4000::/2 8000::/1")

func prefixes(list string) (all []netip.Prefix) {
	for text := range strings.FieldsSeq(list) {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// isIn reports whether one of the networks contains addr, which must be unmapped (see netip.Addr.Unmap).
func isIn(addr netip.Addr, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, func(network netip.Prefix) bool { return network.Contains(addr) })
}

// checkAddress returns an error unless address (ip:port) is public or in allow.
func checkAddress(address string, allow []netip.Prefix) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	addr := ap.Addr().Unmap().WithZone("") // ::ffff:127.0.0.1 is 127.0.0.1
	if isIn(addr, allow) {
		return nil
	}
	target := addr // or the address behind NAT64
	if nat64.Contains(addr) {
		b := addr.As16()
		target = netip.AddrFrom4([4]byte(b[12:]))
	}
	if !target.IsGlobalUnicast() || target.IsPrivate() || isIn(target, notPublic) {
		return badRequest("bind_contents: %s is not a public address", addr)
	}
	return nil
}

// fetch downloads the archive at address and unpacks it into dir while it downloads, in
// constant memory. After an error dir holds a part of it.
func (f *fetcher) fetch(
	ctx context.Context, address string, dir *os.Root, limits unpackLimits, o *owner) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(f.stall, func() { cancel(errStalled) })
	defer stalled.Stop()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return badRequest("bind_contents: must be an http or https URL")
	}
	resp, err := f.client.Do(request)
	if err != nil {
		return fetchError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return newAPIError(kindDownloadFailed, "bind_contents: the server answered %d", resp.StatusCode)
	}
	var failed error // of the download, which unpack would take for the archive's
	body := readerFunc(func(p []byte) (int, error) {
		stalled.Reset(f.stall)
		n, err := resp.Body.Read(p)
		stalled.Stop() // the time between two reads, in which the archive is unpacked, does not count
		if err != nil && err != io.EOF {
			failed = fetchError(ctx, err)
		}
		return n, err
	})
	err = unpack(body, dir, limits, o)
	return cmp.Or(failed, err)
}

// fetchError returns the error for a failed download, without its URL, which may hold a token.
func fetchError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if api, ok := errors.AsType[*apiError](err); ok { // without the url.Error around it
		return api
	}
	return newAPIError(kindDownloadFailed, "bind_contents: cannot download: %s", rootCause(err))
}
