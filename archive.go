package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	maxRedirects = 5
	maxEntryPath = 1024     // bytes
	maxDepth     = 64       // directories in an entry's path
	minFetchRate = 64 << 10 // bytes a second
	copyChunk    = 32 << 10 // bytes of a download, or of a file, that are read at a time
	unzipChunk   = 96 << 10 // bytes that are decompressed while those before them are laid out
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

// notPublic lists what [netip.Addr.IsGlobalUnicast] counts in though it is not public,
// from IANA's special-purpose registries (RFC 6890). 6to4 (2002::/16) and Teredo (in
// 2001::/23) hold an IPv4 address. Of IPv6 only 2000::/3 is public at all. At
// 168.63.129.16 Azure tells its virtual machines their secrets.
const notPublic = "0.0.0.0/8 100.64.0.0/10 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 " +
	"203.0.113.0/24 240.0.0.0/4 168.63.129.16/32 2001::/23 2001:db8::/32 2002::/16 3fff::/20 ::/3 4000::/2 8000::/1"

// checkAddress returns an error unless address, an ip:port, is public or allowed.
func checkAddress(address string, allow []netip.Prefix) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	addr := bare(ap)
	contains := func(network netip.Prefix) bool { return network.Contains(addr) }
	if slices.ContainsFunc(allow, contains) {
		return nil
	}
	refused := badRequest("bind_contents: %s is not a public address", addr)
	if netip.MustParsePrefix("64:ff9b::/96").Contains(addr) { // NAT64: it ends in an IPv4 address
		b := addr.As16()
		addr = netip.AddrFrom4([4]byte(b[12:]))
	}
	if !addr.IsGlobalUnicast() || addr.IsPrivate() {
		return refused
	}
	ours, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, network := range ours { // what listens there may trust who comes from here
		if own, err := netip.ParsePrefix(network.String()); err == nil && own.Addr().Unmap().WithZone("") == addr {
			return errOwnAddress
		}
	}
	for network := range strings.FieldsSeq(notPublic) {
		if contains(netip.MustParsePrefix(network)) {
			return refused
		}
	}
	return nil
}

// bare returns the address alone: ::ffff:127.0.0.1 is 127.0.0.1.
func bare(ap netip.AddrPort) netip.Addr { return ap.Addr().Unmap().WithZone("") }

var errOwnAddress = badRequest("bind_contents: this is the host's own address")

// checkConnection returns an error if a connection comes from where it goes to: this host, by a public
// address that no interface of it has, of a network that the kernel was told is here.
func checkConnection(conn net.Conn, allow []netip.Prefix) error {
	local, remote := bare(conn.LocalAddr().(*net.TCPAddr).AddrPort()), bare(conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	if local != remote || slices.ContainsFunc(allow, func(network netip.Prefix) bool { return network.Contains(remote) }) {
		return nil
	}
	return errOwnAddress
}

var errTooSlow = failure(downloadFailed, "bind_contents: the server sends less than %d bytes a second", minFetchRate)

// fetch downloads the archive at address and lays it out in dir, at once and in
// constant memory. After an error dir holds a part of it.
func (f *fetcher) fetch(ctx context.Context, address string, dir *os.Root, limits unpackLimits, o *owner) error {
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
	return unpack(&download{body: answer.Body, window: f.window, ctx: ctx, cancel: cancel}, dir, limits, o)
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

// download is the body of an answer, which ends when its server is too slow. In each window, which is
// of waiting and not of our own work, minFetchRate has to be kept. Its errors are fetchError's.
type download struct {
	body   io.Reader
	window time.Duration
	ctx    context.Context
	cancel context.CancelCauseFunc
	waited time.Duration // in this window
	got    int64         // bytes in this window
}

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
		err = fetchError(d.ctx, err)
	}
	return n, err
}

// Close ends the download, and with that a Read that waits for the server.
func (d *download) Close() error {
	d.cancel(nil)
	return nil
}

// unpackLimits bound what one archive may make.
type unpackLimits struct {
	bytes   int64 // of the decompressed stream, so that headers and padding count too
	entries int64
}

// unpack lays out a gzipped tar stream in dir: directories, regular files, symbolic and
// hard links, as tar would, but nothing outside dir and nothing that is more than data.
// Owners are the archive's, or all o if that is given; only root can give files away. It closes r.
func unpack(r io.ReadCloser, dir *os.Root, limits unpackLimits, o *owner) error {
	unzipped, unzip := io.Pipe()
	ended := make(chan struct{})
	go func() { // decompresses the next chunk while this one's files are written; ends before unpack does
		defer close(ended)
		ahead := bufio.NewWriterSize(unzip, unzipChunk)
		zipped, err := gzip.NewReader(bufio.NewReaderSize(r, copyChunk))
		if err == nil {
			_, err = ahead.ReadFrom(zipped)
		}
		ahead.Flush() // what comes before an error counts
		unzip.CloseWithError(err)
	}()
	defer func() { unzipped.Close(); r.Close(); <-ended }()
	stream := &limitedReader{r: bufio.NewReaderSize(unzipped, unzipChunk), left: limits.bytes}
	archive := tar.NewReader(stream)
	parent, err := dir.OpenRoot(".")
	if err != nil {
		return err
	}
	u := &unpacker{root: dir, ownedBy: o, asRoot: os.Geteuid() == 0, buffer: make([]byte, copyChunk), parent: parent, parentDir: "."}
	defer func() { u.parent.Close() }()
	size := int64(0) // of the files: a sparse one can have any size in a short stream
	for entries := int64(1); ; entries++ {
		header, err := archive.Next()
		if err == io.EOF {
			return broken(stream.drain(io.Discard)) // only at the stream's end is its checksum verified
		}
		if err != nil {
			return broken(err)
		}
		if size += max(header.Size, 0); size > limits.bytes || size < 0 {
			return failure(tooLarge, "bind_contents: entry %q: more than %d bytes", header.Name, limits.bytes)
		}
		if err := u.add(header, archive); err != nil {
			return err
		}
		if entries+u.implied > limits.entries {
			return failure(tooLarge, "bind_contents: more than %d entries", limits.entries)
		}
	}
}

// broken says why an archive cannot be read on.
func broken(err error) error {
	if err == nil || isA[*apiError](err) {
		return err
	}
	return refuse("the archive is broken: %s", plain(err))
}

// refuse returns an error for an archive that is not to be laid out.
func refuse(format string, args ...any) error {
	return failure(refusedArchive, "bind_contents: "+format, args...)
}

// limitedReader fails, other than io.LimitedReader, when there is more than it may give.
type limitedReader struct {
	r     io.Reader
	left  int64
	ended bool // a read met the end
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.ended = l.ended || err == io.EOF && n == 0
	if l.left -= int64(n); l.left < 0 {
		return 0, failure(tooLarge, "bind_contents: the archive unpacks to too many bytes")
	}
	return n, err
}

// drain reads on from where a tar reader met an archive's end. It takes the end of its
// input for that too: but then the end mark, two blocks of zeros, was cut off.
func (l *limitedReader) drain(to io.Writer) error {
	if l.ended {
		return io.ErrUnexpectedEOF
	}
	_, err := io.Copy(to, l)
	return err
}

// unpacker lays out entries under root. It works from the opened parent directory of
// each, to which it has walked without passing a link, and keeps that for the next.
type unpacker struct {
	root      *os.Root
	ownedBy   *owner
	asRoot    bool
	buffer    []byte
	parent    *os.Root // of the last entry, or another handle of root
	parentDir string   // its path
	implied   int64    // directories made that only a path named
}

// add lays out one entry, in the place of an earlier one that is no directory.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		return nil
	case outside(h.Name) || name == "." && h.Typeflag != tar.TypeDir:
		return refuse("entry %q: its path leads out of the archive", h.Name)
	case len(name) > maxEntryPath || strings.Count(name, "/") > maxDepth: // deeper ones cost too much to walk
		return refuse("entry %q: its path has more than %d bytes or %d directories", h.Name, maxEntryPath, maxDepth)
	case h.Uid < 0 || h.Uid > math.MaxInt32 || h.Gid < 0 || h.Gid > math.MaxInt32:
		return refuse("entry %q: its owner is out of range", h.Name) // to chown, 4294967295 means unchanged
	case name == ".":
		return u.root.Chmod(".", permissions(h))
	}
	parent, err := u.enter(path.Dir(name), true)
	if err == nil {
		err = u.place(parent, name, h, content)
	}
	if errors.Is(err, fs.ErrExist) { // another lookup for this case alone
		if parent, err = u.enter(path.Dir(name), false); err == nil {
			err = makeRoom(parent, path.Base(name))
		}
		if err == nil {
			err = u.place(parent, name, h, content)
		}
	}
	for _, cause := range []error{errThroughLink, errReplacesDir, errLinkTarget, errSymlink, errType,
		syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EMLINK} {
		if errors.Is(err, cause) {
			return refuse("entry %q: %v", h.Name, cause)
		}
	}
	return err
}

var (
	errThroughLink = errors.New("its path passes something that is not a directory")
	errReplacesDir = errors.New("it would replace a directory")
	errLinkTarget  = errors.New("it is a hard link to something that is not an earlier file")
	errSymlink     = errors.New("it is a symbolic link that leads out of the archive")
	errType        = errors.New("it is not a directory, file or link")
)

// outside reports whether a path is not one below the archive's root.
func outside(name string) bool {
	return name == "" || path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..")
}

// staysInside reports whether a symbolic link in dir to target stays below the root
// whatever other such links it passes: it may lead upwards only at its beginning, from
// dir itself, which is no link. "link/../x" could be anywhere.
func staysInside(dir, target string) bool {
	parts := strings.Split(target, "/")
	for len(parts) > 0 && slices.Contains([]string{"", ".", ".."}, parts[0]) {
		parts = parts[1:]
	}
	return target != "" && !path.IsAbs(target) && !slices.Contains(parts, "..") && !outside(path.Join(dir, target))
}

// makeRoom removes an earlier entry that is no directory.
func makeRoom(parent *os.Root, base string) error {
	earlier, err := parent.Lstat(base)
	if err != nil {
		return err
	}
	if earlier.IsDir() {
		return errReplacesDir
	}
	return parent.Remove(base)
}

// place puts an entry where nothing is, or, if it is a directory, where one is.
func (u *unpacker) place(parent *os.Root, name string, h *tar.Header, content io.Reader) (err error) {
	base := path.Base(name)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.placeFile(parent, base, h, content)
	case tar.TypeLink:
		return u.placeLink(name, h.Linkname) // which may close parent
	case tar.TypeSymlink:
		if !staysInside(path.Dir(name), h.Linkname) {
			return errSymlink
		}
		err = parent.Symlink(h.Linkname, base)
	case tar.TypeDir:
		if err = parent.Mkdir(base, 0o700); errors.Is(err, fs.ErrExist) {
			if earlier, statErr := parent.Lstat(base); statErr == nil && earlier.IsDir() {
				err = nil // it gets this entry's mode and owner
			}
		}
	default:
		return errType
	}
	if err == nil && u.asRoot {
		o := u.ownerOf(h)
		err = parent.Lchown(base, o.uid, o.gid)
	}
	if err == nil && h.Typeflag == tar.TypeDir {
		err = parent.Chmod(base, permissions(h))
	}
	return err
}

// ownerOf returns whom an entry is to belong to.
func (u *unpacker) ownerOf(h *tar.Header) *owner { return cmp.Or(u.ownedBy, &owner{h.Uid, h.Gid}) }

// permissions leaves out the setuid, setgid and sticky bits.
func permissions(h *tar.Header) fs.FileMode { return h.FileInfo().Mode().Perm() }

// placeFile never goes through an earlier link: its file must be new. O_NONBLOCK means nothing to a
// file, but spares the four system calls in which package os would find that out.
func (u *unpacker) placeFile(parent *os.Root, base string, h *tar.Header, content io.Reader) error {
	f, err := parent.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, content, u.buffer)
	if err != nil && !isA[*fs.PathError](err) {
		return broken(err)
	}
	if err == nil && u.asRoot {
		o := u.ownerOf(h)
		err = f.Chown(o.uid, o.gid)
	}
	if err == nil {
		err = f.Chmod(permissions(h))
	}
	if err == nil {
		err = parent.Chtimes(base, h.ModTime, h.ModTime)
	}
	return cmp.Or(err, f.Close())
}

// placeLink makes a hard link to a regular file that an earlier entry made.
func (u *unpacker) placeLink(name, target string) error {
	if outside(target) {
		return errLinkTarget
	}
	target = path.Clean(target)
	parent, err := u.enter(path.Dir(target), false)
	var info fs.FileInfo
	if err == nil {
		info, err = parent.Lstat(path.Base(target))
	}
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return errLinkTarget
	}
	if err != nil {
		return err
	}
	return u.root.Link(target, name) // neither passes a link
}

// enter returns the directory dir, and makes what is missing on the way there if it is told
// to. It walks there without passing a link. The unpacker closes it.
func (u *unpacker) enter(dir string, create bool) (*os.Root, error) {
	if u.parentDir == dir {
		return u.parent, nil
	}
	at, err := u.root.OpenRoot(".")
	if err != nil {
		return nil, err
	}
	for part := range strings.SplitSeq(dir, "/") {
		info, err := at.Lstat(part)
		if create && errors.Is(err, fs.ErrNotExist) {
			u.implied++
			err = u.place(at, part, &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}, nil)
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
	u.parent.Close()
	u.parent, u.parentDir = at, dir
	return at, nil
}
