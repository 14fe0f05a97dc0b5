package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	maxEntryPath = 1024      // bytes
	maxDepth     = 64        // directories in an entry's path
	writeChunk   = 128 << 10 // bytes of a file that are written at a time
	blockSize    = 512       // bytes: a tar archive consists of such blocks
)

// unpackLimits limit what one archive may make.
type unpackLimits struct {
	bytes   int64 // of the compressed and of the decompressed stream, so that headers and padding count too
	entries int64
}

// unpack extracts a gzipped tar stream into dir as GNU tar would: directories, regular files, symbolic and
// hard links, but nothing outside dir, no devices and no setuid bits. Owners are o, or else the archive's;
// they are ignored unless we run as root.
func unpack(r io.Reader, dir *os.Root, limits unpackLimits, o *owner) error {
	unzipped, err := newGunzip(&limitedReader{r: r, left: limits.bytes})
	if err != nil {
		return brokenArchive(err)
	}
	archive, err := newTarReader(unzipped, limits.bytes)
	if err != nil {
		return brokenArchive(err)
	}
	parent, err := dir.OpenRoot(".")
	if err != nil {
		return err
	}
	u := &unpacker{root: dir, ownedBy: o, asRoot: os.Geteuid() == 0, buffer: make([]byte, writeChunk),
		parent: parent, parentDir: "."}
	defer func() { u.parent.Close() }()
	size := int64(0) // sum of file sizes: a sparse file can claim any size
	for entries := int64(1); ; entries++ {
		header, err := archive.next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, archive.buffer) // gzip's checksum is verified at its end only
			return brokenArchive(err)
		}
		if err != nil {
			return brokenArchive(err)
		}
		if size += max(header.Size, 0); size > limits.bytes || size < 0 {
			return newAPIError(kindTooLarge, "bind_contents: entry %q: more than %d bytes", header.Name, limits.bytes)
		}
		if err = archive.check(header); err == nil {
			err = u.add(header, archive)
		}
		if err != nil {
			return badEntry(header, err)
		}
		if entries+u.implied > limits.entries {
			return newAPIError(kindTooLarge, "bind_contents: more than %d entries", limits.entries)
		}
	}
}

// badArchive returns the 400 for a bind_contents archive.
func badArchive(format string, args ...any) error {
	return newAPIError(kindArchiveRefused, "bind_contents: "+format, args...)
}

// brokenArchive wraps a read error of an archive.
func brokenArchive(err error) error {
	if err == nil || isType[*apiError](err) {
		return err
	}
	if err == io.ErrUnexpectedEOF {
		return badArchive("the archive is cut off")
	}
	return badArchive("the archive is broken: %s", rootCause(err))
}

// entryError says why an entry is refused.
type entryError string

func (e entryError) Error() string { return string(e) }

const (
	errLeadsOut    entryError = "its path leads out of the archive"
	errPath        entryError = "its path is empty or contains '..'"
	errThroughLink entryError = "its path passes something that is not a directory"
	errReplacesDir entryError = "it would replace a directory that is not empty, or the bind directory"
	errLinkTarget  entryError = "it is a hard link to something that is not an earlier file or link"
	errSymlink     entryError = "it is a symbolic link that leads out of the archive"
	errOwnerRange  entryError = "its owner is out of range"
	errSizedDir    entryError = "its path ends in a slash, but it has content"
	errPAXSize     entryError = "its extended header has a size that is not a plain number"
	errGlobal      entryError = "it is a global header between an extended header and its entry"
	errType        entryError = "it is not a directory, file or link"
)

// badEntry returns the 400 for an entry that is refused, and any other error as it is.
func badEntry(h *tar.Header, err error) error {
	if bad, ok := errors.AsType[entryError](err); ok {
		return badArchive("entry %q: %v", h.Name, bad)
	}
	for _, cause := range []error{syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EMLINK} {
		if errors.Is(err, cause) {
			return badArchive("entry %q: %v", h.Name, cause)
		}
	}
	return err
}

// limitedReader fails beyond its limit, where [io.LimitedReader] returns io.EOF.
type limitedReader struct {
	r    io.Reader
	left int64
}

// Read counts what was read, not what was asked for: a stream that ends just at the limit is whole.
func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, newAPIError(kindTooLarge, "bind_contents: the archive, or what it unpacks to, has too many bytes")
	}
	return n, err
}

// tarReader is a [tar.Reader] for archives that have to be whole. By itself, Next returns io.EOF also where
// its input ends early, between two entries or inside an entry's padding.
type tarReader struct {
	*tar.Reader
	stream *limitedReader
	limit  int64         // of stream
	buffer *bufio.Reader // of stream
	first  byte          // type of the first header that the latest Next read, which can be an extended one

	skipped [blockSize]byte // a buffer
}

// newTarReader returns a tarReader that fails beyond limit bytes, or an error if r is not a tar archive.
func newTarReader(r io.Reader, limit int64) (*tarReader, error) {
	stream := &limitedReader{r: r, left: limit}
	buffer := bufio.NewReaderSize(stream, readChunk)
	start, err := buffer.Peek(blockSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !isTar(start) {
		return nil, badArchive("inside the gzip stream is not a tar archive: it is %s", contentFormat(start))
	}
	return &tarReader{Reader: tar.NewReader(buffer), stream: stream, limit: limit, buffer: buffer}, nil
}

// next returns the next entry's header, or io.EOF at the end mark, two blocks of zeros. Before it there
// always are two blocks left: a header and what follows, or the end mark.
func (t *tarReader) next() (*tar.Header, error) {
	err := error(nil)
	for err == nil { // the content that the caller has not read
		_, err = t.Read(t.skipped[:])
	}
	if err != io.EOF {
		return nil, err
	}
	consumed := t.limit - t.stream.left - int64(t.buffer.Buffered())
	padding := int(-consumed & (blockSize - 1))
	blocks, err := t.buffer.Peek(padding + 2*blockSize)
	if err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	blocks = blocks[padding:]
	if !slices.ContainsFunc(blocks, func(b byte) bool { return b != 0 }) {
		return nil, io.EOF
	}
	t.first = blocks[156]
	header, err := t.Next()
	if err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	return header, err
}

// check returns an error for an entry after which other programs would find other entries: they disagree on
// malformed sizes in extended headers, and on whether a file whose name ends in a slash has content; and
// [tar.Reader.Next] forgets an extended header at a global one, but GNU tar does not.
func (t *tarReader) check(h *tar.Header) error {
	for _, key := range []string{"size", "GNU.sparse.size", "GNU.sparse.realsize"} {
		if size, ok := h.PAXRecords[key]; ok && (size == "" || strings.Trim(size, "0123456789") != "") {
			return errPAXSize
		}
	}
	if h.Typeflag == tar.TypeXGlobalHeader && t.first != tar.TypeXGlobalHeader {
		return errGlobal
	}
	if isDirectory(h) && h.Size != 0 && h.Typeflag != tar.TypeDir && h.Typeflag != gnuDumpDir {
		return errSizedDir
	}
	return nil
}

// unpacker extracts entries below root. For each it opens the parent directory without following
// links, and caches it for the next.
type unpacker struct {
	root      *os.Root
	ownedBy   *owner
	asRoot    bool
	buffer    []byte
	parent    *os.Root // parent of the last entry; initially root itself
	parentDir string   // its path
	implied   int64    // directories created without an entry of their own
}

// add extracts one entry. It replaces an earlier one, unless that is a directory that is not empty.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader || h.Typeflag == gnuVolumeLabel:
		return nil
	case outside(name):
		return errLeadsOut
	case outside(h.Name):
		return errPath
	case len(name) > maxEntryPath || strings.Count(name, "/") > maxDepth: // deeper ones cost too much to walk
		return badArchive("entry %q: its path has more than %d bytes or %d directories",
			h.Name, maxEntryPath, maxDepth)
	case isDirectory(h):
		h.Typeflag = tar.TypeDir
	case name == ".":
		return errReplacesDir
	}
	parent, err := u.enter(path.Dir(name), true)
	if err == nil {
		err = u.place(parent, name, h, content)
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	// An earlier entry is in its place: rare, so not checked up front.
	if parent, err = u.enter(path.Dir(name), false); err == nil {
		err = makeRoom(parent, path.Base(name))
	}
	if err != nil {
		return err
	}
	return u.place(parent, name, h, content)
}

// GNU tar's own types of entries.
const (
	gnuVolumeLabel = 'V' // of tar --label: its name is not a path
	gnuDumpDir     = 'D' // of tar --listed-incremental: a directory whose content is a list of names
)

// isDirectory reports whether GNU tar and bsdtar take an entry for a directory.
func isDirectory(h *tar.Header) bool {
	switch h.Typeflag {
	case tar.TypeDir, gnuDumpDir:
		return true
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return strings.HasSuffix(h.Name, "/")
	}
	return false
}

// outside reports whether name is empty, absolute or contains "..".
func outside(name string) bool {
	return name == "" || path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..")
}

// staysInside reports whether a symbolic link in dir with this target stays below the root, whatever other
// symbolic links it passes. So ".." is allowed only at the start of target, where it is resolved from dir,
// which contains no symbolic link. In a/b:
//
//	c, ../c, ./../../c   stay inside, at a/b/c, a/c and c
//	../../../c           does not: it leads above the root
//	/etc                 does not, in a service or on the host
//	c/../../d            may not: where c is a link to x/y/z, it means x/d and not a/d
func staysInside(dir, target string) bool {
	parts := strings.Split(target, "/")
	for len(parts) > 0 && slices.Contains([]string{"", ".", ".."}, parts[0]) {
		parts = parts[1:]
	}
	return target != "" && !path.IsAbs(target) && !slices.Contains(parts, "..") &&
		!outside(path.Join(dir, target))
}

// makeRoom removes an earlier entry, unless it is a directory that is not empty.
func makeRoom(parent *os.Root, base string) error {
	err := parent.Remove(base)
	if errors.Is(err, fs.ErrExist) { // ENOTEMPTY
		return errReplacesDir
	}
	return err
}

// place creates an entry that must not exist, or a directory that may.
func (u *unpacker) place(parent *os.Root, name string, h *tar.Header, content io.Reader) error {
	base := path.Base(name)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.placeFile(parent, base, h, content)
	case tar.TypeDir:
		return u.placeDirectory(parent, base, h)
	case tar.TypeLink:
		return u.placeLink(name, h.Linkname) // which may close parent
	case tar.TypeSymlink:
		if !staysInside(path.Dir(name), h.Linkname) {
			return errSymlink
		}
		if err := parent.Symlink(h.Linkname, base); err != nil {
			return err
		}
		return u.setOwner(h, func(uid, gid int) error { return parent.Lchown(base, uid, gid) })
	}
	return errType
}

// placeDirectory creates a directory, or gives an earlier one this entry's mode and owner.
func (u *unpacker) placeDirectory(parent *os.Root, base string, h *tar.Header) error {
	if err := parent.Mkdir(base, 0o700); err != nil {
		if earlier, statErr := parent.Lstat(base); statErr != nil || !earlier.IsDir() {
			return err
		}
	}
	err := u.setOwner(h, func(uid, gid int) error { return parent.Lchown(base, uid, gid) })
	if err != nil {
		return err
	}
	return parent.Chmod(base, permissions(h))
}

// setOwner calls chown with the owner that a new file, directory or symbolic link is to have.
func (u *unpacker) setOwner(h *tar.Header, chown func(uid, gid int) error) error {
	uid, gid := h.Uid, h.Gid
	if u.ownedBy != nil {
		uid, gid = u.ownedBy.uid, u.ownedBy.gid
	}
	if !u.asRoot {
		return nil
	}
	if min(uid, gid) < 0 || max(uid, gid) > math.MaxInt32 {
		return errOwnerRange // chown(2) takes 4294967295 for "unchanged"
	}
	return chown(uid, gid)
}

// permissions leaves out the setuid, setgid and sticky bits.
func permissions(h *tar.Header) fs.FileMode { return h.FileInfo().Mode().Perm() }

// placeFile creates a new file (O_EXCL), so that it never writes through a link. O_NONBLOCK has no effect
// on files, but saves package os four system calls.
func (u *unpacker) placeFile(parent *os.Root, base string, h *tar.Header, content io.Reader) error {
	f, err := parent.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, content, u.buffer)
	if err != nil && !isType[*fs.PathError](err) {
		return brokenArchive(err)
	}
	if err == nil {
		err = u.setOwner(h, f.Chown)
	}
	if err == nil {
		err = f.Chmod(permissions(h))
	}
	if err == nil {
		err = setModTime(parent, base, f, h.ModTime)
	}
	return cmp.Or(err, f.Close())
}

// setModTime sets the times of f, which is base in parent and open with O_NONBLOCK. [os.Root.Chtimes] goes
// by t.UnixNano, which wraps after the year 2262. For such a time, utimensat(2) takes the nearest one that
// the file system has.
func setModTime(parent *os.Root, base string, f *os.File, t time.Time) error {
	if time.Unix(0, t.UnixNano()).Equal(t) {
		return parent.Chtimes(base, t, t)
	}
	when := syscall.NsecToTimespec(int64(t.Nanosecond()))
	when.Sec = t.Unix()
	return syscall.UtimesNano(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), []syscall.Timespec{when, when})
}

// placeLink makes a hard link to a regular file or symbolic link that an earlier entry made.
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
	if errors.Is(err, fs.ErrNotExist) {
		return errLinkTarget
	}
	if err != nil {
		return err
	}
	switch {
	case target == name: // GNU tar writes such an entry for a file that it was given twice
		return nil
	case info.Mode().Type() == fs.ModeSymlink: // in another directory, it may lead elsewhere
		to, err := parent.Readlink(path.Base(target))
		if err != nil {
			return err
		}
		if !staysInside(path.Dir(name), to) {
			return errSymlink
		}
	case !info.Mode().IsRegular():
		return errLinkTarget
	}
	return u.root.Link(target, name) // both parents were walked without following links
}

// enter opens dir without following symbolic links. It creates missing directories if create is set. The
// result belongs to u.
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
			err = u.placeDirectory(at, part, &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755})
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

// owner is a numeric user and group.
type owner struct{ uid, gid int }
