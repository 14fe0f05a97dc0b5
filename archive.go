package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

const (
	maxRedirects = 5
	maxEntryPath = 1024      // bytes
	minFetchRate = 64 << 10  // bytes a second
	fetchHeaders = 64 << 10  // bytes
	readChunk    = 64 << 10  // bytes
	writeChunk   = 128 << 10 // bytes
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
	return &fetcher{
		window: time.Minute,
		client: &http.Client{
			Transport: &http.Transport{
				Proxy:                  nil, // one would resolve names for us, past the check
				DialContext:            dialer.DialContext,
				TLSHandshakeTimeout:    30 * time.Second,
				ResponseHeaderTimeout:  30 * time.Second,
				MaxResponseHeaderBytes: fetchHeaders,
				DisableKeepAlives:      true,
				DisableCompression:     true, // or the archive would arrive as a bare tar from some servers
			},
			CheckRedirect: func(r *http.Request, via []*http.Request) error {
				r.Header.Del("Referer") // holds the whole URL that redirected, with its token
				if len(via) > maxRedirects {
					return failure(http.StatusBadGateway, "bind_contents: more than %d redirects", maxRedirects)
				}
				if r.URL.Scheme != "http" && r.URL.Scheme != "https" {
					return badRequest("bind_contents: redirected to something other than http or https")
				}
				return nil
			},
		},
	}
}

// Networks that [netip.Addr.IsGlobalUnicast] counts in though they are not public, from
// IANA's special-purpose registries (RFC 6890). Of IPv6 only 2000::/3 is public at all.
var specialNetworks = parsePrefixes(
	"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15",
	"198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
	"2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20") // Teredo and 6to4 hold an IPv4 address

var (
	publicIPv6 = netip.MustParsePrefix("2000::/3")
	nat64      = netip.MustParsePrefix("64:ff9b::/96") // its last four bytes are an IPv4 address
)

func parsePrefixes(texts ...string) (prefixes []netip.Prefix) {
	for _, text := range texts {
		prefixes = append(prefixes, netip.MustParsePrefix(text))
	}
	return prefixes
}

// checkAddress returns an error unless address, an ip:port, is public or allowed.
func checkAddress(address string, allow []netip.Prefix) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	addr := ap.Addr().Unmap() // ::ffff:127.0.0.1 is 127.0.0.1
	for _, prefix := range allow {
		if prefix.Contains(addr.WithZone("")) {
			return nil
		}
	}
	if !publicAddress(addr) {
		return badRequest("bind_contents: %s is not a public address", addr)
	}
	return nil
}

func publicAddress(addr netip.Addr) bool {
	if nat64.Contains(addr) {
		b := addr.As16()
		addr = netip.AddrFrom4([4]byte(b[12:]))
	}
	if !addr.IsGlobalUnicast() || addr.IsPrivate() || addr.Zone() != "" || (addr.Is6() && !publicIPv6.Contains(addr)) {
		return false
	}
	for _, prefix := range specialNetworks {
		if prefix.Contains(addr) {
			return false
		}
	}
	return true
}

var errTooSlow = failure(http.StatusBadGateway, "bind_contents: the server sends less than %d bytes a second", minFetchRate)

// unpack downloads the archive at address and lays it out in dir, at once and in
// constant memory. After an error dir holds a part of it.
func (f *fetcher) unpack(ctx context.Context, address string, dir *os.Root, limits unpackLimits, o *owner) error {
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
		return failure(http.StatusBadGateway, "bind_contents: the server answered %d", answer.StatusCode)
	}
	source := &source{body: answer.Body, window: f.window, cancel: cancel}
	err = unpack(bufio.NewReaderSize(source, readChunk), dir, limits, o)
	if source.err != nil { // whatever unpack made of it
		return fetchError(ctx, source.err)
	}
	return err
}

// fetchError says why a download failed, without its URL, which may hold a token.
func fetchError(ctx context.Context, err error) error {
	var api *apiError
	var in *url.Error
	switch {
	case errors.As(context.Cause(ctx), &api), errors.As(err, &api):
		return api
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &in):
		err = in.Err
	}
	return failure(http.StatusBadGateway, "bind_contents: cannot download: %v", err)
}

// source is a download that ends when its server is too slow, and remembers its failure.
type source struct {
	body   io.Reader
	window time.Duration           // of waiting for the server, not of our own work
	cancel context.CancelCauseFunc // ends the download
	waited time.Duration           // in this window
	got    int64                   // bytes in this window
	err    error                   // other than io.EOF
}

func (s *source) Read(p []byte) (int, error) {
	start := time.Now()
	stalled := time.AfterFunc(s.window, func() { s.cancel(errTooSlow) })
	n, err := s.body.Read(p)
	stalled.Stop()
	s.waited += time.Since(start)
	s.got += int64(n)
	if s.waited >= s.window {
		if s.got < int64(minFetchRate*s.waited.Seconds()) {
			err = errTooSlow
		}
		s.waited, s.got = 0, 0
	}
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// unpackLimits bound what one archive may make.
type unpackLimits struct {
	bytes   int64 // of the decompressed stream, so that headers and padding count too
	entries int64
}

// unpack lays out a gzipped tar stream in dir: directories, regular files, symbolic and
// hard links, as tar would, but nothing outside dir and nothing that is more than data.
// Owners are the archive's, or all o if that is given. Errors that name an entry are for the client.
func unpack(r io.Reader, dir *os.Root, limits unpackLimits, o *owner) error {
	zipped, err := gzip.NewReader(r)
	if err != nil {
		return badRequest("bind_contents: not a gzip file: %v", err)
	}
	stream := &limitedReader{zipped, limits.bytes}
	archive := tar.NewReader(stream)
	u := &unpacker{root: dir, owner: o, asRoot: os.Geteuid() == 0, left: limits.bytes, buffer: make([]byte, writeChunk)}
	defer u.close()
	for entries := int64(0); ; entries++ {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return streamError(err)
		}
		if entries == limits.entries {
			return failure(http.StatusRequestEntityTooLarge, "bind_contents: more than %d entries", limits.entries)
		}
		// A sparse file can have any size in a short stream.
		if u.left -= header.Size; u.left < 0 {
			return failure(http.StatusRequestEntityTooLarge, "bind_contents: entry %q: the archive unpacks to more than %d bytes", header.Name, limits.bytes)
		}
		if err := u.add(header, archive); err != nil {
			return err
		}
	}
	// The archive's end is not the stream's: only there is the checksum verified.
	if _, err := io.CopyBuffer(io.Discard, stream, u.buffer); err != nil {
		return streamError(err)
	}
	return nil
}

// streamError says why a stream cannot be read on.
func streamError(err error) error {
	var api *apiError
	if errors.As(err, &api) {
		return err
	}
	return badRequest("bind_contents: the archive is broken: %v", err)
}

// limitedReader fails, other than io.LimitedReader, when there is more than it may give.
type limitedReader struct {
	r    io.Reader
	left int64
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, failure(http.StatusRequestEntityTooLarge, "bind_contents: the archive unpacks to too many bytes")
	}
	return n, err
}

// unpacker lays out entries under root. It works from the opened parent directory of
// each, to which it has walked without passing a link, and keeps that for the next.
type unpacker struct {
	root      *os.Root
	owner     *owner
	asRoot    bool  // only root can give files away
	left      int64 // bytes that files may still have
	buffer    []byte
	parent    *os.Root // of the last entry
	parentDir string   // its path
}

func (u *unpacker) close() {
	if u.parent != nil {
		u.parent.Close()
	}
}

// add lays out one entry. What is not data, would lie outside the root or would be
// reached through a link is refused.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	refuse := func(why string) error { return badRequest("bind_contents: entry %q: %s", h.Name, why) }
	name, why := entryPath(h.Name)
	if why != "" {
		return refuse(why)
	}
	if h.Uid < 0 || h.Uid > math.MaxInt32 || h.Gid < 0 || h.Gid > math.MaxInt32 {
		return refuse("its owner is out of range") // to chown, 4294967295 means unchanged
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return refuse("it would replace the directory itself")
		}
		return u.root.Chmod(".", h.FileInfo().Mode().Perm())
	}
	parent, err := u.open(path.Dir(name))
	if err != nil {
		return entryError(h.Name, err)
	}
	base := path.Base(name)
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.addDir(parent, base, h)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		err = u.addFile(parent, base, h, content)
	case tar.TypeSymlink:
		if !staysInside(path.Dir(name), h.Linkname) {
			return refuse("it is a symbolic link that points outside")
		}
		err = u.addLink(parent, base, h)
	case tar.TypeLink:
		err = u.addHardLink(parent, name, h)
	default:
		return refuse("it is not a directory, file or link")
	}
	return entryError(h.Name, err)
}

// entryPath returns the clean relative path of an entry, or why there is none.
func entryPath(name string) (clean, why string) {
	switch {
	case name == "":
		return "", "it has no name"
	case len(name) > maxEntryPath:
		return "", fmt.Sprintf("its path has more than %d bytes", maxEntryPath)
	case path.IsAbs(name):
		return "", "its path is absolute"
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", "its path leads upwards"
		}
	}
	return path.Clean(name), ""
}

// staysInside reports whether a symbolic link in dir to target stays below the root
// whatever other such links it passes: it may lead upwards only at its beginning, from
// dir itself, which is no link. "link/../x" could be anywhere.
func staysInside(dir, target string) bool {
	if target == "" || path.IsAbs(target) {
		return false
	}
	depth, down := 0, false
	if dir != "." {
		depth = strings.Count(dir, "/") + 1
	}
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "", ".":
		case "..":
			if depth--; down || depth < 0 {
				return false
			}
		default:
			down = true
		}
	}
	return true
}

var (
	errThroughLink = errors.New("its path passes something that is not a directory")
	errReplacesDir = errors.New("it would replace a directory")
	errLinkTarget  = errors.New("it is a hard link to something that is not an earlier file")
)

// entryError turns what an entry did wrong into an error for the client. What the
// file system does wrong stays our own fault.
func entryError(name string, err error) error {
	for _, cause := range []error{errThroughLink, errReplacesDir, errLinkTarget, syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EMLINK} {
		if errors.Is(err, cause) {
			return badRequest("bind_contents: entry %q: %v", name, cause)
		}
	}
	return err
}

// open returns the directory dir, made if it is missing. The unpacker closes it.
func (u *unpacker) open(dir string) (*os.Root, error) {
	if u.parent != nil && u.parentDir == dir {
		return u.parent, nil
	}
	opened, err := walk(u.root, dir, u.makeMissing)
	if err != nil {
		return nil, err
	}
	u.close()
	u.parent, u.parentDir = opened, dir
	return opened, nil
}

// makeMissing makes a directory that the archive uses and has no entry for.
func (u *unpacker) makeMissing(parent *os.Root, name string) error {
	if err := parent.Mkdir(name, 0o755); err != nil {
		return err
	}
	if err := u.own(parent, name, &tar.Header{}); err != nil {
		return err
	}
	return parent.Chmod(name, 0o755) // whatever the umask
}

// walk opens the directory dir below root without passing a link. It calls missing for
// each part of the way that is not there. The caller closes what it returns.
func walk(root *os.Root, dir string, missing func(*os.Root, string) error) (*os.Root, error) {
	at, err := root.OpenRoot(".")
	if err != nil {
		return nil, err
	}
	for part := range strings.SplitSeq(dir, "/") {
		info, err := at.Lstat(part)
		if errors.Is(err, fs.ErrNotExist) {
			err = missing(at, part)
		} else if err == nil && !info.IsDir() {
			err = errThroughLink
		}
		var below *os.Root
		if err == nil {
			below, err = at.OpenRoot(part)
		}
		at.Close()
		if err != nil {
			return nil, err
		}
		at = below
	}
	return at, nil
}

func (u *unpacker) addDir(parent *os.Root, base string, h *tar.Header) error {
	err := parent.Mkdir(base, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if err = clear(parent, base); errors.Is(err, errReplacesDir) {
			err = nil // it is that directory, with another mode perhaps
		} else if err == nil {
			err = parent.Mkdir(base, 0o700)
		}
	}
	if err != nil {
		return err
	}
	if err := u.own(parent, base, h); err != nil {
		return err
	}
	mode := h.FileInfo().Mode().Perm()
	if !u.asRoot {
		mode |= 0o700 // or nothing could be put there
	}
	return parent.Chmod(base, mode)
}

// addFile writes a regular file that is new, so never through a link that an earlier
// entry made.
func (u *unpacker) addFile(parent *os.Root, base string, h *tar.Header, content io.Reader) error {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	f, err := parent.OpenFile(base, flags, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if err := clear(parent, base); err != nil {
			return err
		}
		f, err = parent.OpenFile(base, flags, 0o600)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, content, u.buffer); err != nil {
		var local *fs.PathError
		if errors.As(err, &local) {
			return err
		}
		return streamError(err)
	}
	if err := u.own(parent, base, h); err != nil {
		return err
	}
	if err := f.Chmod(h.FileInfo().Mode().Perm()); err != nil { // no setuid, setgid or sticky bit
		return err
	}
	if err := parent.Chtimes(base, h.ModTime, h.ModTime); err != nil {
		return err
	}
	return f.Close()
}

func (u *unpacker) addLink(parent *os.Root, base string, h *tar.Header) error {
	if err := clear(parent, base); err != nil {
		return err
	}
	if err := parent.Symlink(h.Linkname, base); err != nil {
		return err
	}
	return u.own(parent, base, h)
}

// addHardLink links to a regular file that an earlier entry made. It leaves the owner
// and mode that this has.
func (u *unpacker) addHardLink(parent *os.Root, name string, h *tar.Header) error {
	target, why := entryPath(h.Linkname)
	if why != "" || target == name {
		return errLinkTarget
	}
	dir, err := walk(u.root, path.Dir(target), func(*os.Root, string) error { return errLinkTarget })
	if err != nil {
		return err
	}
	defer dir.Close()
	if info, err := dir.Lstat(path.Base(target)); err != nil || !info.Mode().IsRegular() {
		return errLinkTarget
	}
	if err := clear(parent, path.Base(name)); err != nil {
		return err
	}
	return u.root.Link(target, name)
}

// clear removes what an earlier entry put at name, unless that is a directory.
func clear(parent *os.Root, name string) error {
	info, err := parent.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.IsDir() {
		return errReplacesDir
	}
	return parent.Remove(name)
}

// own gives an entry to its owner. It follows no link.
func (u *unpacker) own(parent *os.Root, base string, h *tar.Header) error {
	if !u.asRoot {
		return nil
	}
	if u.owner != nil {
		return parent.Lchown(base, u.owner.uid, u.owner.gid)
	}
	return parent.Lchown(base, h.Uid, h.Gid)
}
