package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
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
	readChunk    = 64 << 10 // bytes that are read at a time
	gzipMagic    = "\x1f\x8b"
)

// fetcher downloads bind_contents from untrusted servers.
type fetcher struct {
	client *http.Client
	stall  time.Duration // a download ends when its server has sent nothing for so long
}

// newFetcher returns a fetcher that connects to public addresses and to those in allow, which prevents
// server-side request forgery (SSRF). It sends the URL and nothing else of ours.
func newFetcher(allow []netip.Prefix) *fetcher {
	f := &fetcher{stall: time.Minute}
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
			return stallConn{conn, f.stall}, nil
		},
		TLSHandshakeTimeout:    30 * time.Second,
		ResponseHeaderTimeout:  30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		DisableCompression:     true, // or the archive would arrive as a bare tar from some servers
	}
	f.client = &http.Client{Transport: transport, CheckRedirect: checkRedirect}
	return f
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

// stallConn is a connection on which a Read fails with errStalled if no byte arrives in time. The time
// between two reads, in which the archive is unpacked, does not count.
type stallConn struct {
	net.Conn
	timeout time.Duration
}

func (c stallConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errStalled
	}
	return n, err
}

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
	body := &bodyReader{Reader: resp.Body}
	err = unpack(body, dir, limits, o)
	if body.err != nil { // the download's error, not the archive error that it causes in unpack
		return fetchError(ctx, body.err)
	}
	return err
}

// fetchError returns the error for a failed download, without its URL, which may hold a token.
func fetchError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if isType[*apiError](err) {
		return err
	}
	if in, ok := errors.AsType[*url.Error](err); ok {
		err = in.Err
	}
	return newAPIError(kindDownloadFailed, "bind_contents: cannot download: %s", rootCause(err))
}

// bodyReader remembers its error, other than io.EOF.
type bodyReader struct {
	io.Reader
	err error
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}

// gunzip decompresses the members of a gzip stream (RFC 1952) and ignores zeros behind the last one, as
// gzip(1) does: the tar of macOS and the BSDs pads its compressed output with them.
type gunzip struct {
	packed *bufio.Reader
	member *gzip.Reader
	err    error // of the latest Read
}

func newGunzip(r io.Reader) (*gunzip, error) {
	g := &gunzip{packed: bufio.NewReaderSize(r, readChunk), member: new(gzip.Reader)}
	start, err := g.packed.Peek(blockSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !bytes.HasPrefix(start, []byte(gzipMagic)) {
		return nil, badArchive("the archive is %s, not gzip", contentFormat(start))
	}
	return g, g.nextMember()
}

func (g *gunzip) Read(p []byte) (n int, err error) {
	for n == 0 && g.err == nil && len(p) > 0 {
		n, g.err = g.member.Read(p)
		if g.err == io.EOF {
			g.err = g.nextMember()
		}
	}
	return n, g.err
}

// nextMember begins the next member, or returns io.EOF if only zeros are left.
func (g *gunzip) nextMember() error {
	start, _ := g.packed.Peek(len(gzipMagic))
	if string(start) == gzipMagic {
		err := g.member.Reset(g.packed)
		g.member.Multistream(false)
		return err
	}
	for {
		b, err := g.packed.ReadByte()
		if err != nil {
			return err
		}
		if b != 0 {
			return badArchive("something other than zeros follows the gzip stream")
		}
	}
}

// signatures are the first bytes of what is taken for a .tar.gz archive by mistake.
var signatures = []struct{ start, format string }{
	{gzipMagic, "gzip"}, {"\x1f\x9d", "compressed by compress"},
	{"BZh", "compressed by bzip2"}, {"\xfd7zXZ\x00", "compressed by xz"}, {"LZIP", "compressed by lzip"},
	{"\x28\xb5\x2f\xfd", "compressed by zstd"}, {"\x50\x2a\x4d\x18", "compressed by zstd"},
	{"\x04\x22\x4d\x18", "compressed by lz4"}, {"7z\xbc\xaf\x27\x1c", "a 7z archive"},
	{"PK\x03\x04", "a zip archive"}, {"PK\x05\x06", "a zip archive"}, {"PK\x07\x08", "a zip archive"},
}

// contentFormat names the format of a file by its first 512 bytes.
func contentFormat(start []byte) string {
	if len(start) == 0 {
		return "empty"
	}
	for _, s := range signatures {
		if bytes.HasPrefix(start, []byte(s.start)) {
			return s.format
		}
	}
	if isTar(start) {
		return "a tar archive that is not compressed"
	}
	kind := http.DetectContentType(bytes.TrimPrefix(start, []byte("\uFEFF")))
	if strings.HasPrefix(kind, "text/html") {
		return "HTML"
	}
	return kind
}

// isTar reports whether a file whose first 512 bytes are start is a tar archive.
func isTar(start []byte) bool {
	if len(start) < blockSize {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(start)).Next() // which fails otherwise if an entry needs more bytes
	return err != tar.ErrHeader
}
