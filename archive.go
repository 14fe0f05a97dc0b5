package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"compress/gzip"
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
)

const (
	maxEntryPath = 1024      // bytes
	maxDepth     = 64        // directories in an entry's path: deeper ones cost too much to walk
	readChunk    = 64 << 10  // bytes that are read at a time
	writeChunk   = 128 << 10 // bytes of a file that are written at a time
)

const (
	errReplacesDir refusal = "it would replace a directory that is not empty, or the bind directory"
	errLinkTarget  refusal = "it is a hard link to something that is not an earlier file or link"
	errSymlink     refusal = "it is a symbolic link that leads out of the archive, or has '..' after a name"
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
	parent, err := dir.OpenRoot(".")
	if err != nil {
		return err
	}
	u := &unpacker{root: dir, limits: limits, ownedBy: o, buffer: make([]byte, writeChunk),
		parent: parent, parentDir: "."}
	defer func() { u.parent.Close() }()
	unzipped := gunzip(limited(r, limits.bytes)) // limits the compressed bytes; the next line limits the rest
	in := bufio.NewReaderSize(limited(unzipped, limits.bytes), readChunk)
	archive, err := newTarReader(in, "the content of the gzip stream is not a tar archive")
	if err == nil {
		err = archive.each(u.add)
	}
	if err == nil {
		_, err = io.Copy(io.Discard, in) // gzip's checksum is verified at its end only
	}
	return archiveError("bind_contents: ", err)
}

var errTooManyBytes = newAPIError(kindTooLarge,
	"bind_contents: the archive, or what it unpacks to, has too many bytes")

// limited returns a reader that fails after limit bytes of r, where [io.LimitReader] returns io.EOF.
func limited(r io.Reader, limit int64) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		if limit -= int64(n); limit < 0 { // a stream that ends just at the limit is whole
			return 0, errTooManyBytes
		}
		return n, err
	})
}

// gunzip decompresses the members of a gzip stream (RFC 1952) and ignores zeros after the last one, as
// gzip(1) does: the tar of macOS and the BSDs pads its compressed output with them.
func gunzip(r io.Reader) io.Reader {
	packed := bufio.NewReaderSize(r, readChunk)
	format, err := contentFormat(packed)
	if err == nil && format != gzipFormat {
		err = refusal("the archive is " + format + ", not gzip")
	}
	member := new(gzip.Reader)
	if err == nil {
		err = nextMember(member, packed)
	}
	return readerFunc(func(p []byte) (n int, _ error) {
		for n == 0 && err == nil {
			if n, err = member.Read(p); err == io.EOF {
				err = nextMember(member, packed)
			}
		}
		return n, err
	})
}

// nextMember begins the next member, or returns io.EOF if only zeros are left.
func nextMember(member *gzip.Reader, packed *bufio.Reader) error {
	start, _ := packed.Peek(2)
	if compression(start) == gzipFormat {
		err := member.Reset(packed)
		member.Multistream(false)
		return err
	}
	b, err := packed.ReadByte()
	for b == 0 && err == nil {
		b, err = packed.ReadByte()
	}
	return cmp.Or[error](err, refusal("something other than zeros follows the gzip stream"))
}

// unpacker extracts entries below root. For each it opens the parent directory without following
// links, and caches it for the next. Making a hard link enters the target's directory, which replaces the
// cached one: see enter.
type unpacker struct {
	root      *os.Root
	limits    unpackLimits
	bytes     int64 // sum of the files' sizes
	entries   int64 // with the directories created without an entry of their own
	ownedBy   *owner
	buffer    []byte
	parent    *os.Root // parent of the last entry; initially root itself
	parentDir string   // its path
}

// GNU tar's own types of entries.
const (
	gnuVolumeLabel = 'V' // of tar --label: its name is not a path
	gnuDumpDir     = 'D' // of tar --listed-incremental: a directory whose content is a list of names
)

// add extracts one entry. It replaces an earlier one, unless that is a directory that is not empty.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	u.entries++
	size, name := max(h.Size, 0), path.Clean(h.Name)
	if size > u.limits.bytes-u.bytes { // a sparse file can claim any size
		return newAPIError(kindTooLarge, "bind_contents: entry %q: more than %d bytes", h.Name, u.limits.bytes)
	}
	u.bytes += size
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, gnuVolumeLabel:
		return nil
	case gnuDumpDir:
		h.Typeflag, size = tar.TypeDir, 0
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		h.Typeflag = tar.TypeReg
		if strings.HasSuffix(h.Name, "/") { // a directory for GNU tar and bsdtar
			h.Typeflag = tar.TypeDir
		}
	}
	switch {
	case outside(name):
		return refusal("its path leads out of the archive")
	case outside(h.Name):
		return refusal("its path is empty or contains '..'")
	case len(name) > maxEntryPath || strings.Count(name, "/") > maxDepth:
		return refusal(fmt.Sprintf("its path has more than %d bytes or %d directories", maxEntryPath, maxDepth))
	case h.Typeflag == tar.TypeDir && size > 0: // programs differ on whether content follows
		return refusal("it is a directory, but it has a size")
	case h.Typeflag != tar.TypeDir && path.Base(h.Name) == ".":
		return refusal("its name is that of a directory")
	}
	return u.put(name, h, content)
}

// put makes room for an entry if needed, and places it.
func (u *unpacker) put(name string, h *tar.Header, content io.Reader) error {
	for {
		parent, err := u.enter(path.Dir(name), true)
		if err == nil {
			err = u.place(parent, name, h, content)
		}
		if !errors.Is(err, fs.ErrExist) {
			return entryError(err)
		}
		// An earlier entry is in its place: rare, so not checked up front. The parent was walked without following
		// links.
		if err = u.root.Remove(name); errors.Is(err, fs.ErrExist) { // ENOTEMPTY
			return errReplacesDir
		}
		if err != nil {
			return err
		}
	}
}

// entryError returns a refusal for an error of the file system that is the entry's fault.
func entryError(err error) error {
	if no, ok := errors.AsType[syscall.Errno](err); ok &&
		slices.Contains([]syscall.Errno{syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EMLINK}, no) {
		return refusal(no.Error())
	}
	return err
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

// place creates an entry that must not exist, or a directory that may.
func (u *unpacker) place(parent *os.Root, name string, h *tar.Header, content io.Reader) error {
	if u.entries > u.limits.entries {
		return newAPIError(kindTooLarge, "bind_contents: more than %d entries", u.limits.entries)
	}
	base, err := path.Base(name), error(refusal("it is not a directory, file or link"))
	switch h.Typeflag {
	case tar.TypeReg:
		err = u.placeFile(parent, base, h, content)
	case tar.TypeDir:
		err = placeDirectory(parent, base, h)
	case tar.TypeLink:
		return u.placeLink(name, h.Linkname) // which may close parent
	case tar.TypeSymlink:
		err = errSymlink
		if staysInside(path.Dir(name), h.Linkname) {
			err = parent.Symlink(h.Linkname, base)
		}
	}
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	o := cmp.Or(u.ownedBy, &owner{h.Uid, h.Gid})
	if min(o.uid, o.gid) < 0 || max(o.uid, o.gid) > math.MaxInt32 {
		return errOwner // chown(2) takes 4294967295 for "unchanged"
	}
	return parent.Lchown(base, o.uid, o.gid)
}

// placeFile creates a new file (O_EXCL), so that it never writes through a link. O_NONBLOCK has no effect on
// files, but saves package os four system calls.
func (u *unpacker) placeFile(parent *os.Root, base string, h *tar.Header, content io.Reader) error {
	f, err := parent.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, content, u.buffer); err != nil {
		return err
	}
	// Chtimes goes by UnixNano, which wraps after the year 2262. utimensat(2) takes the nearest time that the
	// file system has.
	when := syscall.Timespec{Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond())}
	err = syscall.UtimesNano(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), []syscall.Timespec{when, when})
	return cmp.Or(err, f.Chmod(permissions(h)), f.Close())
}

// permissions leaves out the setuid, setgid and sticky bits.
func permissions(h *tar.Header) fs.FileMode { return fs.FileMode(h.Mode).Perm() }

// placeDirectory creates a directory, or gives an earlier one this entry's mode.
func placeDirectory(parent *os.Root, base string, h *tar.Header) error {
	if err := parent.Mkdir(base, 0o700); err != nil {
		if earlier, statErr := parent.Lstat(base); statErr != nil || !earlier.IsDir() {
			return err
		}
	}
	return parent.Chmod(base, permissions(h))
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
			u.entries++
			err = u.place(at, part, &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		} else if err == nil && !info.IsDir() {
			err = refusal("its path passes something that is not a directory")
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
